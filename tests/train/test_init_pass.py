"""What a method that starts from data is shown: the run's first rows, no more than it asks for, and once."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.conftest import prepared
from tests.train.test_loop import interrupted, weights
from veneer.adapters.attach import load_adapter
from veneer.base.load import load_model
from veneer.methods.base import MethodConfig
from veneer.methods.init.eva import EVA, Directions
from veneer.recipe.settings import Recipe
from veneer.train import setup
from veneer.train.init_pass import init_pass
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]


def fed(job: Make, tokens: int, *, packing: bool) -> list[list[int]]:
    ready = prepared(job(**{"data.packing": packing}))
    seen: list[list[int]] = []
    hook = ready.base.embedding.register_forward_pre_hook(lambda m, x: seen.append(x[0][0].tolist()))
    init_pass(ready.base, ready.job, tokens)()
    hook.remove()
    first = [ready.job.examples[i].tokens.tolist() for step in ready.job.steps for members in step for i in members]
    assert [t for row in seen for t in row] == [t for row in first for t in row][: sum(map(len, seen))]
    return seen


@pytest.mark.parametrize("packing", [True, False])
def test_it_sees_the_runs_first_rows_until_there_are_enough(job: Make, packing: bool) -> None:
    seen = fed(job, 300, packing=packing)
    assert sum(map(len, seen)) >= 300 > sum(map(len, seen[:-1]))
    assert len(fed(job, 1, packing=packing)) == 1
    assert sum(map(len, fed(job, 10**9, packing=packing))) > 600


def test_eva_trains_starts_from_the_rows_and_is_the_same_after_an_interruption(
    job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "lora", "rank": 4, "dropout": 0.2, "init": {"name": "eva", "look": 200}}
    whole, broken = (job(name, method=method) for name in ("whole", "broken"))
    looked = []
    monkeypatch.setattr(Directions, "see", counted(Directions.see, looked))
    outcome, ready = train_recipe(whole)
    assert looked and ready is not None
    ranks = {path: len(delta.a) for path, delta in ready.adapter.deltas.items()}  # type: ignore[arg-type]
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 4 * 14
    interrupted(broken, 2)
    looked.clear()
    monkeypatch.setattr(EVA, "settle", None)  # ranks are not shared out a second time
    assert train_recipe(broken)[0].steps == 6
    assert looked == []
    assert weights(broken) == weights(whole)
    loaded = load_model(whole.model, dtype="float32")
    adapter = load_adapter(loaded.network, outcome.adapter)
    assert {path: len(delta.a) for path, delta in adapter.deltas.items()} == ranks  # type: ignore[arg-type]


def test_a_run_of_the_first_version_goes_on_to_the_same_bytes(job: Make) -> None:
    """There eva was a method: in the recipe, in the run's folder and in the checkpoint."""
    new = {"name": "lora", "rank": 4, "dropout": 0.2, "init": {"name": "eva", "look": 200}}
    old = {"name": "eva", "rank": 4, "dropout": 0.2, "look": 200}
    whole, broken = job("whole", method=new), job("broken", method=old)
    assert broken.method == whole.method
    train_recipe(whole)
    interrupted(broken, 2)
    folder = Path(broken.run)
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["method"] = {**{k: v for k, v in tree["method"].items() if k != "init"}, **old}
    header = (folder / "recipe.yaml").read_text().partition("\n")[0]
    (folder / "recipe.yaml").write_text(f"{header}\n{yaml.safe_dump(tree)}")
    state = next(folder.glob("checkpoints/*/state.json"))
    facts = json.loads(state.read_text())
    settings = {**facts["begun"]["settings"], "init": "uniform", "most": 2.0, "look": 200}
    state.write_text(json.dumps({**facts, "begun": {**facts["begun"], "method": "eva", "settings": settings}}))
    assert train_recipe(job("broken", method=old))[0].resumed_from == 2
    assert weights(broken) == weights(whole)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["method"]["init"] == new["init"]


def test_the_same_rows_begin_it_the_same_way(job: Make) -> None:
    method = {"name": "lora", "rank": 4, "init": {"name": "eva", "look": 200}}
    first, second = (prepared(job(name, method=method)).adapter for name in ("one", "two"))
    assert asdict(first.settings) == asdict(second.settings)  # type: ignore[call-overload]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    other = prepared(job("three", method=method, **{"train.seed": 1})).adapter
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=False))


def test_nobody_else_looks(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("looked")

    monkeypatch.setattr(setup, "init_pass", lambda *a, **k: refuse)
    assert prepared(job()).adapter.attached
    assert MethodConfig().data_init is None


def counted(see: Callable[..., None], calls: list[int]) -> Callable[..., None]:
    def counting(self: Directions, x: Tensor) -> None:
        calls.append(len(x))
        see(self, x)

    return counting


def test_progress_is_told_of_every_micro_batch(job: Make, monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    from contextlib import contextmanager

    from veneer.train import init_pass as look_module

    told: list[Any] = []

    @contextmanager
    def showing(what: str, total: int) -> Any:
        told.append((what, total))
        yield told.append

    monkeypatch.setattr(look_module, "showing", showing)
    ready = prepared(job())
    init_pass(ready.base, ready.job, 300)()
    assert told[0][0] == "looking at the training rows: micro-batches" and told[1:] == [1] * told[0][1]
