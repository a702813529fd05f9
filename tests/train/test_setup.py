"""From job to training: the base, the adapter, and what does not fit them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import prepared
from veneer.errors import ConfigError, TargetError
from veneer.kernels import native
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]


def test_a_job(job: Make, rows: Path) -> None:
    said: list[str] = []
    recipe = job(**{"data.eval": str(rows), "data.eval_rows": 3})
    ready = prepared(recipe, said.append)
    assert ready.base.network is ready.adapter.model and ready.base.name == recipe.model
    assert said == [f"reading {rows}", f"loading {recipe.model}"]
    assert not any(d.training for d in ready.adapter.deltas.values())  # dropout off until a step turns it on
    assert ready.adapter.attached
    assert ready.adapter.base_name == recipe.model


def test_the_same_seed_starts_the_same_adapter(job: Make) -> None:
    a, b, c = (prepared(job(**{"train.seed": s})).adapter.parameters() for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_a_row_longer_than_the_model_reads(job: Make, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "count " * 300, "completion": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ConfigError, match=rf"{path}:2 has \d+ tokens, but the model reads at most 256; set train.max_length"
    ):
        prepared(job(**{"data": {"train": str(path)}, "train.max_length": 2048}))
    assert max(map(len, prepared(job(**{"data": {"train": str(path)}, "train.max_length": 256})).job.examples)) == 256


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": {"name": "lora", "targets": ["q_prj"]}}, TargetError, "q_proj"),
        ({"method": {"name": "lora", "rank_pattern": {"x_proj": 2}}}, ConfigError, "x_proj"),
    ],
)
def test_what_is_wrong_is_said_before_training(job: Make, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        prepared(job(**changes))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, None),
        ({"optimizer.bits": 8}, "8-bit AdamW"),
        ({"optimizer.bits": 8, "storage": {"name": "int8"}}, "8-bit AdamW"),
        ({"optimizer.bits": 8, "storage": {"name": "nf4"}}, "with 4-bit weights"),
    ],
)
def test_a_missing_c_library_is_said_once_where_it_would_compute(
    settings: dict[str, object], what: str | None, job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: native.Status(False, None, None, "turned off"))
    said: list[str] = []
    prepared(job(**settings), said.append)
    lines = [line for line in said if "plain torch" in line]
    assert lines == ([] if what is None else [f"plain torch computes {what}, slower: turned off"])
