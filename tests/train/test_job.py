"""Rows and steps of a run: the order of steps, and what is wrong with rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from veneer import machine
from veneer.data.example import Example
from veneer.errors import DataError, ModelError
from veneer.recipe.settings import Recipe, TrainSettings
from veneer.train.job import hash_of, order_of_steps, read_job, steps_of, with_dtype

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


def test_a_job_has_rows_and_steps_and_no_weights(job: Make, rows: Path) -> None:
    said: list[str] = []
    recipe = job(**{"data.eval": str(rows), "data.eval_rows": 3})
    ready = read_job(recipe, said.append)
    assert (len(ready.examples), len(ready.held_out), len(ready.steps)) == (24, 3, 6)
    assert ready.report.layouts == {"prompt -> completion": 24}
    assert ready.data_hash == hash_of(ready.examples) and ready.recipe is recipe
    assert said == [f"reading {rows}"]


def test_another_recipe_over_the_same_rows_has_its_own_steps(job: Make) -> None:
    ready, other = read_job(job()), job(**{"train.tokens_per_step": 32})
    changed = ready.with_recipe(other)
    assert changed.recipe is other and changed.examples is ready.examples
    assert changed.steps == steps_of(other, ready.examples) != ready.steps


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "/nowhere/model"}, ModelError, "/nowhere/model"),
        ({"data": {"train": "/nowhere/rows.jsonl"}}, DataError, "/nowhere/rows.jsonl"),
        ({"data.eval": "/nowhere/held.jsonl"}, DataError, "/nowhere/held.jsonl"),
        ({"data.split": "test", "data.prompt": "{question}", "data.completion": "{sql}"}, DataError, "question"),
    ],
)
def test_unusable_rows_and_models_are_refused(job: Make, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_job(job(**changes))


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
