"""Recipes that fit are found cheapest first, are true recipes, and really fit."""

from collections.abc import Callable
from typing import Any

import pytest

from veneer.plan.alternatives import _steps, nearest
from veneer.plan.memory import Estimate, Room, estimate, verdict
from veneer.recipe.load import parse_flags
from veneer.recipe.overrides import with_changes
from veneer.recipe.settings import Recipe
from veneer.train.job import Job, order_of_steps, read_job

Make = Callable[..., Recipe]
MIB = 2**20


@pytest.fixture
def rows(recipe: Make) -> Job:
    return read_job(recipe())


def foreseen(recipe: Recipe, rows: Job) -> Estimate:
    order = order_of_steps([len(e) for e in rows.examples], recipe.train, packing=recipe.data.packing)
    return estimate(recipe, rows, order, 100 * MIB)


def test_what_is_shown_fits_and_is_pasted_as_flags(recipe: Make, rows: Job) -> None:
    room = Room(foreseen(recipe(), rows).peak_bytes - 1, 2**40, "memory.budget")
    fits = nearest(recipe(), rows, room, 100 * MIB)
    assert 1 <= len(fits) <= 3
    for fit in fits:
        assert parse_flags(fit.flags.split()) == fit.changes
        again = foreseen(with_changes(recipe(), fit.changes), rows)
        assert again.peak_bytes == fit.found.peak_bytes < foreseen(recipe(), rows).peak_bytes
        assert verdict(again, room) == []
    assert list(fits[0].changes) == ["train.micro_batch_tokens"]  # costs nothing but some time


def test_portions_come_before_recomputing_and_the_disk_comes_last(recipe: Make, rows: Job) -> None:
    tried = [list(change) for change in _steps(recipe(), rows)]
    assert tried[0] == ["train.micro_batch_tokens"] and tried[-1] == ["optimizer.paged"]
    alone = recipe(data={**recipe().data.model_dump(), "packing": False})
    assert next(_steps(alone, rows)) == {"train.recompute": True}
    again = recipe(**{"train.recompute": True, "storage.name": "nf4"})
    assert ["storage.name"] not in [list(change) for change in _steps(again, rows)]


def test_nothing_fits_in_nothing(recipe: Make, rows: Job) -> None:
    assert nearest(recipe(), rows, Room(MIB, 2**40, "memory.budget"), 100 * MIB) == []


def test_a_method_without_matrices_is_not_given_8_bits(recipe: Make, rows: Job, monkeypatch: Any) -> None:
    tried: list[str] = []
    monkeypatch.setattr("veneer.plan.alternatives._tried", lambda *args: tried.extend(args[-1]) or [])
    nearest(recipe(), rows, Room(MIB, 2**40, "memory.budget"), 100 * MIB)
    assert "optimizer.bits" in tried
    tried.clear()
    nearest(recipe(method={"name": "ia3"}), rows, Room(MIB, 2**40, "memory.budget"), 100 * MIB)
    assert tried and "optimizer.bits" not in tried


def test_what_an_optimizer_does_not_have_is_in_no_combination(recipe: Make, rows: Job, monkeypatch: Any) -> None:
    tried: list[dict[str, Any]] = []
    monkeypatch.setattr("veneer.plan.alternatives._tried", lambda *args: tried.append(args[-1]) or [])
    nearest(recipe(optimizer={"name": "lion"}), rows, Room(MIB, 2**40, "memory.budget"), 100 * MIB)
    assert {"train.recompute", "storage.name", "memory.page_weights"} <= tried[-1].keys()
    assert not [changes for changes in tried if {"optimizer.bits", "optimizer.paged"} & changes.keys()]
