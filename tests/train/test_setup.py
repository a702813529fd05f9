"""From recipe to job: the plan of steps, and everything that can be wrong before the first."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from veneer import machine
from veneer.data.example import Example
from veneer.errors import ConfigError, DataError, ModelError, TargetError
from veneer.kernels import native
from veneer.recipe.settings import Recipe, TrainSettings
from veneer.train.setup import hash_of, order_of_steps, prepare, with_dtype

Make = Callable[..., Recipe]
LENGTHS = [10] * 20


def plan(**settings: object) -> list[list[list[int]]]:
    return order_of_steps(LENGTHS, TrainSettings(tokens_per_step=40, max_length=64, **settings), packing=True)


def used(steps: list[list[list[int]]]) -> list[int]:
    return [i for step in steps for micro in step for i in micro]


def test_one_epoch_unless_said_otherwise() -> None:
    assert len(plan()) == 5
    assert sorted(used(plan())) == list(range(20))


def test_each_epoch_is_whole_and_in_its_own_order() -> None:
    steps = plan(epochs=3)
    assert len(steps) == 15
    orders = [used(steps[i : i + 5]) for i in (0, 5, 10)]
    assert [sorted(o) for o in orders] == [list(range(20))] * 3
    assert len({tuple(o) for o in orders}) == 3


@pytest.mark.parametrize(("epochs", "steps"), [(0.4, 2), (1.6, 8), (0.01, 1), (2.0, 10), (2.01, 11)])
def test_a_share_of_an_epoch_is_a_share_of_its_steps(epochs: float, steps: int) -> None:
    assert plan(epochs=epochs) == plan(epochs=3)[:steps]


@pytest.mark.parametrize("steps", [1, 5, 6, 13])
def test_steps_go_on_into_as_many_epochs_as_they_need(steps: int) -> None:
    assert plan(steps=steps) == plan(epochs=3)[:steps]


def test_the_seed_orders() -> None:
    assert plan(seed=1) != plan(seed=0) == plan(seed=0)


def test_a_job(job: Make, rows: Path) -> None:
    said: list[str] = []
    recipe = job(**{"data.eval": str(rows), "data.eval_rows": 3})
    ready = prepare(recipe, said.append)
    assert len(ready.examples) == 24
    assert len(ready.held_out) == 3
    assert len(ready.plan) == 6
    assert said == [f"reading {rows}", f"loading {recipe.model}"]
    assert not any(d.training for d in ready.adapter.deltas.values())  # dropout off until a step turns it on
    assert ready.adapter.attached
    assert ready.adapter.base_name == recipe.model


def test_the_same_seed_starts_the_same_adapter(job: Make) -> None:
    a, b, c = (prepare(job(**{"train.seed": s})).adapter.parameters() for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_a_row_longer_than_the_model_reads(job: Make, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "count " * 300, "completion": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ConfigError, match=rf"{path}:2 has \d+ tokens, but the model reads at most 256; set train.max_length"
    ):
        prepare(job(**{"data": {"train": str(path)}, "train.max_length": 2048}))
    assert max(map(len, prepare(job(**{"data": {"train": str(path)}, "train.max_length": 256})).examples)) == 256


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/nowhere/model"}, ModelError, "/nowhere/model"),
        ({"data": {"train": "/nowhere/rows.jsonl"}}, DataError, "/nowhere/rows.jsonl"),
        ({"data.eval": "/nowhere/held.jsonl"}, DataError, "/nowhere/held.jsonl"),
        ({"data.split": "test", "data.prompt": "{question}", "data.completion": "{sql}"}, DataError, "question"),
        ({"method": {"name": "lora", "targets": ["q_prj"]}}, TargetError, "q_proj"),
        ({"method": {"name": "lora", "rank_pattern": {"x_proj": 2}}}, ConfigError, "x_proj"),
    ],
)
def test_what_is_wrong_is_said_before_training(job: Make, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(job(**changes))


def test_a_run_keeps_the_dtype_it_began_in(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compute_dtype", lambda: "bfloat16")
    assert with_dtype(job(**{"train.dtype": "auto"})).train.dtype == "bfloat16"
    assert with_dtype(job(**{"train.dtype": "float32"})) == job(**{"train.dtype": "float32"})


def test_the_hash_sees_every_token_mask_and_border() -> None:
    def example(tokens: list[int], supervised: list[int]) -> Example:
        return Example(np.array(tokens, dtype=np.int32), np.isin(np.arange(len(tokens)), supervised), "x", 1)

    rows = [example([1, 2, 3], [1, 2]), example([4, 5], [1])]
    others = [
        [example([1, 2, 9], [1, 2]), rows[1]],
        [example([1, 2, 3], [2]), rows[1]],
        [rows[1], rows[0]],
        [rows[0]],
        [example([1, 2, 3, 4, 5], [1, 2, 4])],
    ]
    assert len({hash_of(r) for r in [rows, *others]}) == 6
    assert hash_of(rows) == hash_of([replace(e, source="y", line=7) for e in rows])


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
    prepare(job(**settings), said.append)
    lines = [line for line in said if "plain torch" in line]
    assert lines == ([] if what is None else [f"plain torch computes {what}, slower: turned off"])
