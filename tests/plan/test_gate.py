"""A run that cannot fit ends before its weights are read; one that may fit goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plan.conftest import train_fitting
from veneer.disk.adapter_dir import read_facts
from veneer.disk.run_dir import RunDir
from veneer.errors import ConfigError, ModelError, Refused
from veneer.plan import gate
from veneer.plan.gate import fit
from veneer.plan.memory import Room, estimate
from veneer.recipe.load import load_recipe, write_recipe
from veneer.recipe.overrides import with_changes
from veneer.recipe.settings import Recipe
from veneer.train.events import Event
from veneer.train.job import order_of_steps, read_job, with_dtype
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]


class Stopped(Exception):
    """In the middle of a run."""


def test_too_small_a_budget_is_refused_before_loading(recipe: Make, monkeypatch: Any) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("veneer.train.setup.load_model", never)
    with pytest.raises(
        Refused, match=r"(?s)will not fit; nothing was loaded:\n  memory: .* but memory.budget leaves 1 MiB"
    ) as e:
        train_fitting(recipe(**{"memory.budget": "1MiB"}))
    assert e.value.exit_status == 3


def test_force_says_it_and_trains(recipe: Make) -> None:
    said: list[str] = []
    outcome, _ = train_fitting(recipe(**{"memory.budget": "1MiB"}), say=said.append, force=True)
    assert outcome.steps == 2
    assert len(said) == 1 and said[0].startswith("may not fit: memory: ")


def test_what_fits_says_nothing(recipe: Make) -> None:
    said: list[str] = []
    train_fitting(recipe(**{"memory.budget": "64GiB"}), say=said.append)
    assert said == []


def test_a_model_that_cannot_be_sized_is_trained(recipe: Make, monkeypatch: Any) -> None:
    def unknown(*_: Any) -> None:
        raise ModelError("no blocks")

    monkeypatch.setattr(gate, "estimate", unknown)
    said: list[str] = []
    job = read_job(recipe())
    assert fit(job, say=said.append) is job
    assert said == ["whether it fits is not known: no blocks"]
    with pytest.raises(Refused, match=r"memory.auto has nothing to go by, .*: no blocks"):
        fit(read_job(recipe(memory="auto")), say=said.append)


def room_between(monkeypatch: Any, recipe: Recipe, changes: dict[str, Any]) -> None:
    """Leave room for the recipe with these changes, and for nothing larger."""
    rows = read_job(recipe)
    changed = with_changes(recipe, changes)
    order = order_of_steps([len(e) for e in rows.examples], changed.train, packing=changed.data.packing)
    monkeypatch.setattr("veneer.machine.rss_bytes", lambda: 100 << 20)
    least = estimate(changed, rows, order).peak_bytes
    monkeypatch.setattr(gate, "room_for", lambda _: Room(least, 1 << 40, "this machine"))


def test_auto_picks_what_costs_least_and_the_run_keeps_it(recipe: Make, monkeypatch: Any, tmp_path: Path) -> None:
    made = recipe(memory="auto", data={**recipe().data.model_dump(), "packing": False}, **{"train.checkpoint_every": 1})
    room_between(monkeypatch, made, {"train.recompute": True})
    said: list[str] = []

    def stop(event: Event) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train_fitting(made, [lambda e: stop(e) if e.step == 2 else None], said.append)
    assert any(s.startswith("it would not fit:\n  memory: ") for s in said)
    assert any(s.startswith("memory.auto picks --train.recompute true (") for s in said)
    run = RunDir(made.run)
    assert run.picked() == {"train.recompute": True}
    assert load_recipe(run.recipe).train.recompute is True and load_recipe(run.recipe).memory.auto

    monkeypatch.setattr(gate, "room_for", lambda _: Room(1 << 40, 1 << 40, "this machine"))  # now all would fit
    said.clear()
    outcome, job = train_fitting(made, say=said.append)
    assert job is not None and job.job.recipe.train.recompute is True
    assert outcome.resumed_from == 1 and outcome.picked == {"train.recompute": True}
    assert read_facts(run.adapter)["recipe"]["train"]["recompute"] is True
    assert train_fitting(made, say=said.append)[0] == outcome  # done; the same recipe is still the run's


def test_auto_changes_nothing_that_fits_and_refuses_what_cannot(recipe: Make, monkeypatch: Any) -> None:
    outcome, job = train_fitting(recipe(memory="auto"))
    assert outcome.picked == {} and job is not None and job.job.recipe == with_dtype(recipe(memory="auto"))
    other = recipe(memory={"auto": True, "budget": "1MiB"}, run=recipe().run + "-2")
    with pytest.raises(Refused, match="will not fit"):
        train_fitting(other)


def test_a_run_that_made_no_step_is_picked_for_anew(recipe: Make, monkeypatch: Any) -> None:
    made = recipe(memory="auto")
    run = RunDir(made.run)
    run.root.mkdir()
    run.begin(write_recipe(with_changes(with_dtype(made), {"train.recompute": True})))
    run.pick({"train.recompute": True})
    outcome, _ = train_fitting(made)
    assert outcome.picked == {} and not run.changes.exists()


def test_without_anyone_to_pick_auto_is_an_error(recipe: Make) -> None:
    with pytest.raises(ConfigError, match=r"memory\.auto is true, but train picks nothing by itself"):
        train_recipe(recipe(memory="auto"))
