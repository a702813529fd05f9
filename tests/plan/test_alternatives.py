"""Recipes that fit are found cheapest first, are true recipes, and really fit."""

from collections.abc import Callable
from typing import Any

from tests.plan.checked import checked
from veneer.models import skeleton
from veneer.plan.alternatives import nearest, possible_changes
from veneer.plan.memory import Estimate, estimate
from veneer.plan.room import Room, verdict
from veneer.recipe.load import parse_flags
from veneer.recipe.overrides import with_changes
from veneer.recipe.settings import Recipe
from veneer.train.preflight import preflight

Make = Callable[..., Recipe]
MIB = 2**20


def foreseen(recipe: Recipe) -> Estimate:
    return estimate(checked(recipe), 100 * MIB)


def test_what_is_shown_fits_and_is_pasted_as_flags(recipe: Make) -> None:
    room = Room(foreseen(recipe()).peak_bytes - 1, 2**40, "memory.budget")
    fits = nearest(checked(recipe()), room, 100 * MIB)
    assert 1 <= len(fits) <= 3
    for fit in fits:
        assert parse_flags(fit.flags.split()) == fit.changes
        again = foreseen(with_changes(recipe(), fit.changes))
        assert fit.checked.recipe == with_changes(recipe(), fit.changes)
        assert again.peak_bytes == fit.found.peak_bytes < foreseen(recipe()).peak_bytes
        assert verdict(again, room) == []
    assert list(fits[0].changes) == ["train.micro_batch_tokens"]  # costs nothing but some time


def test_portions_come_before_recomputing_and_the_disk_comes_last(recipe: Make) -> None:
    tried = [list(change) for change in possible_changes(checked(recipe()))]
    assert tried[0] == ["train.micro_batch_tokens"] and tried[-1] == ["optimizer.paged"]
    alone = recipe(data={**recipe().data.model_dump(), "packing": False})
    assert next(possible_changes(checked(alone))) == {"train.recompute": True}
    again = recipe(**{"train.recompute": True, "storage.name": "nf4"})
    assert ["storage.name"] not in [list(change) for change in possible_changes(checked(again))]


def test_nothing_fits_in_nothing(recipe: Make) -> None:
    assert nearest(checked(recipe()), Room(MIB, 2**40, "memory.budget"), 100 * MIB) == []


def test_a_method_without_matrices_is_not_given_8_bits(recipe: Make, monkeypatch: Any) -> None:
    tried: list[str] = []
    monkeypatch.setattr("veneer.plan.alternatives._tried", lambda *args: tried.extend(args[-1]) or [])
    nearest(checked(recipe()), Room(MIB, 2**40, "memory.budget"), 100 * MIB)
    assert "optimizer.bits" in tried
    tried.clear()
    nearest(checked(recipe(method={"name": "ia3"})), Room(MIB, 2**40, "memory.budget"), 100 * MIB)
    assert tried and "optimizer.bits" not in tried


def test_what_an_optimizer_does_not_have_is_in_no_combination(recipe: Make, monkeypatch: Any) -> None:
    tried: list[dict[str, Any]] = []
    monkeypatch.setattr("veneer.plan.alternatives._tried", lambda *args: tried.append(args[-1]) or [])
    nearest(checked(recipe(optimizer={"name": "lion"})), Room(MIB, 2**40, "memory.budget"), 100 * MIB)
    assert {"train.recompute", "storage.name", "memory.page_weights"} <= tried[-1].keys()
    assert not [changes for changes in tried if {"optimizer.bits", "optimizer.paged"} & changes.keys()]


def test_no_change_is_offered_that_training_would_refuse(recipe: Make) -> None:
    """Gradients are not kept, so a step has to stay one micro-batch."""
    of = {"optimizer.in_backward": True, "train.tokens_per_step": 128, "train.micro_batch_tokens": None}
    made = checked(recipe(**of, **{"train.clip": 0.0}))
    room = Room(estimate(made, 0).peak_bytes - 1, 2**40, "this machine")
    fits = nearest(made, room, 0)
    assert fits and not any("train.micro_batch_tokens" in fit.changes for fit in fits)
    for fit in fits:
        preflight(fit.checked.job)


def test_one_meta_model_serves_all_changes_of_one_storage(recipe: Make, monkeypatch: Any) -> None:
    made, built = checked(recipe()), []
    real = skeleton.build_skeleton
    monkeypatch.setattr("veneer.base.meta.build_skeleton", lambda *a, **k: built.append(a) or real(*a, **k))
    nearest(made, Room(MIB, 2**40, "memory.budget"), 100 * MIB)
    assert len(built) == 1  # that of nf4
