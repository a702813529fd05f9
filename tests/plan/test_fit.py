"""A run that cannot fit ends before its weights are read; one that may fit goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plan.checked import checked
from veneer.cli.main import invoke
from veneer.cli.train import TrainProgress
from veneer.disk.adapter_dir import read_facts
from veneer.disk.run_dir import RunDir
from veneer.errors import ConfigError, ModelError, Refused
from veneer.models import skeleton
from veneer.plan import fit as module
from veneer.plan.fit import Fitting, fit
from veneer.plan.memory import estimate
from veneer.plan.room import Room
from veneer.recipe.load import load_recipe, write_recipe
from veneer.recipe.overrides import with_changes
from veneer.recipe.settings import Recipe
from veneer.train.events import Event
from veneer.train.job import with_dtype
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
PLENTY = Room(1 << 40, 1 << 40, "this machine")


@pytest.fixture
def train(tmp_path: Path, capsys: Any) -> Callable[..., tuple[int, str]]:
    """`train(recipe, "--force")`: the command's exit status and what it says."""

    def run(recipe: Recipe, *flags: str) -> tuple[int, str]:
        file = tmp_path / "recipe.yaml"
        file.write_text(write_recipe(recipe))
        status = invoke(["train", str(file), *flags])
        return status, capsys.readouterr().err

    return run


def test_too_small_a_budget_is_refused_before_loading(
    recipe: Make, train: Callable[..., tuple[int, str]], monkeypatch: Any
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("veneer.train.setup.load_model", never)
    with pytest.raises(
        Refused, match=r"(?s)will not fit; nothing was loaded:\n  memory: .* but memory.budget leaves 1 MiB"
    ):
        fit(checked(recipe(**{"memory.budget": "1MiB"})), say=print)
    status, said = train(recipe(**{"memory.budget": "1MiB"}))
    assert status == 3 and "will not fit; nothing was loaded" in said


def test_force_says_it_and_trains(recipe: Make, train: Callable[..., tuple[int, str]]) -> None:
    status, said = train(recipe(**{"memory.budget": "1MiB"}), "--force")
    assert status == 0 and "may not fit: memory: " in said


def test_what_fits_says_nothing(recipe: Make) -> None:
    said: list[str] = []
    made = checked(recipe(**{"memory.budget": "64GiB"}))
    assert fit(made, say=said.append) is made and said == []


def test_a_model_that_cannot_be_traced_is_trained(recipe: Make, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs values")

    monkeypatch.setattr("veneer.plan.trace.hidden_states", broken)
    said: list[str] = []
    made, auto = checked(recipe()), checked(recipe(memory="auto"))
    assert fit(made, say=said.append) is made
    assert len(said) == 1 and said[0].startswith("whether it fits is not known: ") and "needs values" in said[0]
    with pytest.raises(Refused, match=r"memory.auto has no estimate to go by, .*needs values"):
        fit(auto, say=said.append)
    assert fit(auto, say=said.append, force=True) is auto and fit(auto, say=said.append, fixed=True) is auto
    with pytest.raises(ModelError, match="needs values"):
        Fitting.of(made)


def room_between(monkeypatch: Any, recipe: Recipe, changes: dict[str, Any]) -> None:
    """Leave room for the recipe with these changes, and for nothing larger."""
    monkeypatch.setattr("veneer.machine.rss_bytes", lambda: 100 << 20)
    least = estimate(checked(with_changes(recipe, changes))).peak_bytes
    monkeypatch.setattr(module, "room_for", lambda _: Room(least, 1 << 40, "this machine"))


def test_auto_picks_what_costs_least(recipe: Make, monkeypatch: Any) -> None:
    made = recipe(memory="auto", data={**recipe().data.model_dump(), "packing": False})
    room_between(monkeypatch, made, {"train.recompute": True})
    said: list[str] = []
    picked = fit(checked(made), say=said.append)
    assert picked.recipe == with_changes(made, {"train.recompute": True})
    assert said[0].startswith("it would not fit:\n  memory: ")
    assert said[1].startswith("memory.auto picks --train.recompute true (") and len(said) == 2
    fixed = checked(made)
    assert fit(fixed, fixed=True, force=True, say=said.append) is fixed  # a run has begun with it


def test_the_run_keeps_what_was_picked(
    recipe: Make, train: Callable[..., tuple[int, str]], monkeypatch: Any, tmp_path: Path
) -> None:
    made = recipe(memory="auto", data={**recipe().data.model_dump(), "packing": False}, **{"train.checkpoint_every": 1})
    made = with_dtype(made)
    room_between(monkeypatch, made, {"train.recompute": True})

    def interrupted(_: TrainProgress, event: Event) -> None:
        if event.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainProgress, "__call__", interrupted)
        assert train(made)[0] != 0
    run = RunDir(made.run)
    assert run.picked() == {"train.recompute": True}
    assert load_recipe(run.recipe).train.recompute is True and load_recipe(run.recipe).memory.auto
    monkeypatch.setattr(module, "room_for", lambda _: PLENTY)  # now all would fit
    status, said = train(made)
    assert status == 0 and "resuming after step 1" in said
    assert read_facts(run.adapter)["recipe"]["train"]["recompute"] is True
    assert "is done already" in train(made)[1]  # the same recipe is still the run's


def test_auto_changes_nothing_that_fits_and_refuses_what_cannot(recipe: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "room_for", lambda _: PLENTY)
    made = checked(recipe(memory="auto"))
    assert fit(made, say=print) is made
    monkeypatch.setattr(module, "room_for", lambda _: Room(1 << 20, 1 << 40, "this machine"))
    with pytest.raises(Refused, match="will not fit"):
        fit(made, say=print)


def test_a_run_that_made_no_step_is_picked_for_anew(recipe: Make, train: Callable[..., tuple[int, str]]) -> None:
    made = recipe(memory="auto")
    run = RunDir(made.run)
    run.root.mkdir()
    run.begin(write_recipe(with_changes(with_dtype(made), {"train.recompute": True})))
    run.pick({"train.recompute": True})
    assert train(made)[0] == 0
    assert not run.changes.exists() and load_recipe(run.recipe).train.recompute is False


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_one_meta_model_is_built_for_a_start(
    storage: str, recipe: Make, train: Callable[..., tuple[int, str]], monkeypatch: Any
) -> None:
    """Preflight, estimate and fit share it; loading builds a skeleton of its own to fill."""
    on_meta: list[Any] = []
    loaded: list[Any] = []
    real = skeleton.build_skeleton

    for builds, place in ((on_meta, "base.meta"), (loaded, "base.load"), (on_meta, "plan.timing")):

        def build(*args: Any, builds: list[Any] = builds, **more: Any) -> Any:
            builds.append(args)
            return real(*args, **more)

        monkeypatch.setattr(f"veneer.{place}.build_skeleton", build)
    assert train(recipe(**{"storage.name": storage}))[0] == 0
    assert (len(on_meta), len(loaded)) == (1, 1)


def test_the_library_picks_nothing_by_itself(recipe: Make) -> None:
    with pytest.raises(ConfigError, match=r"memory\.auto is true, but train picks nothing by itself"):
        train_recipe(recipe(memory="auto"))
