"""The life of a run: which folder it takes, what it refuses, what a finished one says, and what is picked for it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.conftest import mean_loss
from tests.train.test_loop import interrupted
from veneer.adapters.attach import load_adapter
from veneer.base.load import load_model
from veneer.disk.run_dir import RunDir
from veneer.errors import ConfigError, DataError, DiskError, TrainingError
from veneer.recipe.load import load_recipe, write_recipe
from veneer.recipe.overrides import with_changes
from veneer.recipe.settings import Recipe
from veneer.train import run
from veneer.train.job import read_job, with_dtype
from veneer.train.preflight import preflight
from veneer.train.run import open_run, train_recipe
from veneer.train.setup import set_up

Make = Callable[..., Recipe]


def test_a_run_that_is_done_says_so_and_loads_nothing(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = job(**{"train.steps": 2})
    outcome, _ = train_recipe(recipe)
    monkeypatch.setattr(run, "set_up", lambda *_: pytest.fail("the model was loaded"))
    said: list[str] = []
    again, done = train_recipe(recipe, say=said.append)
    assert asdict(again) == asdict(outcome)
    assert done is None
    assert said == [f"{recipe.run} is done already"]


def test_another_recipe_in_the_same_folder_is_refused(job: Make) -> None:
    train_recipe(job(**{"train.steps": 2}))
    with pytest.raises(ConfigError, match=r"another recipe:\n  train.steps is 2 there, 3 here\nGive this"):
        train_recipe(job(**{"train.steps": 3}))


def test_a_recipe_that_failed_before_its_first_step_may_be_corrected(job: Make) -> None:
    with pytest.raises(DataError):
        train_recipe(job(data={"train": "/nowhere.jsonl"}))
    train_recipe(job(**{"train.steps": 1}))


def test_changed_rows_are_refused_when_going_on(job: Make, rows: Path, tmp_path: Path) -> None:
    own = tmp_path / "rows.jsonl"
    own.write_bytes(rows.read_bytes())
    recipe = job(**{"data.train": str(own)})
    interrupted(recipe, 2)
    lines = own.read_text().splitlines(keepends=True)
    own.write_text("".join([*lines[:-1], lines[0]]))
    with pytest.raises(TrainingError, match=r"rows are not those of checkpoint .*step-2; put the old file"):
        train_recipe(recipe)
    own.write_bytes(rows.read_bytes())
    train_recipe(recipe)


def test_a_folder_of_something_else_is_refused_before_anything_is_loaded(job: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tex\)"):
        train_recipe(job(model="/nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"file cannot be a run's folder"):
        train_recipe(job("file", model="/nowhere"))


def test_lost_events_do_not_lose_the_adapter(job: Make) -> None:
    recipe = job()
    interrupted(recipe, 6)
    (Path(recipe.run) / "events.jsonl").unlink()
    outcome, _ = train_recipe(recipe)
    assert outcome.loss != outcome.loss  # not a number: nobody knows it any more
    assert outcome.adapter_bytes > 0


def test_the_recipe_in_the_folder_is_the_run(job: Make) -> None:
    recipe = job()
    train_recipe(recipe)
    kept = load_recipe(Path(recipe.run) / "recipe.yaml")
    assert kept == recipe
    assert write_recipe(kept) in (Path(recipe.run) / "recipe.yaml").read_text()


def test_what_is_saved_is_what_was_trained(job: Make, rows: Path) -> None:
    recipe = job(**{"data.eval": str(rows)})
    outcome, done = train_recipe(recipe)
    assert done is not None
    fresh = load_model(recipe.model, dtype="float32").network
    adapter = load_adapter(fresh, outcome.adapter)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), done.adapter.parameters(), strict=True))
    assert mean_loss(fresh, done.job.held_out, recipe) == outcome.eval_loss  # and its dropout was off


def test_what_was_picked_for_a_run_stays_its_recipe(job: Make) -> None:
    recipe = job(memory="auto", **{"train.checkpoint_every": 1})
    with pytest.raises(KeyboardInterrupt), open_run(recipe) as session:
        assert not session.fixed
        picked = with_changes(session.recipe, {"train.recompute": True})
        training = set_up(preflight(read_job(session.recipe).with_recipe(picked)))
        session.train(training, [lambda event: stop() if event.step == 2 else None])
    assert RunDir(recipe.run).picked() == {"train.recompute": True}
    with open_run(recipe) as session:
        assert session.fixed and session.recipe == with_changes(with_dtype(recipe), {"train.recompute": True})
        figures = session.train(set_up(preflight(read_job(session.recipe))))
    assert figures.picked == {"train.recompute": True} and figures.resumed_from == 1


def stop() -> None:
    raise KeyboardInterrupt


def test_without_anyone_to_pick_auto_is_an_error(job: Make) -> None:
    with pytest.raises(ConfigError, match=r"memory\.auto is true, but train picks nothing by itself"):
        train_recipe(job(memory="auto"))


def test_two_processes_do_not_train_in_one_folder(job: Make) -> None:
    with open_run(job()), pytest.raises(ConfigError, match="another process is training in"), open_run(job()):
        pass


def test_figures_of_an_earlier_version_name_their_folder(job: Make) -> None:
    recipe = job(**{"train.steps": 1})
    figures, _ = train_recipe(recipe)
    RunDir(recipe.run).finish({k: v for k, v in asdict(figures).items() if k != "folder"})
    assert train_recipe(recipe)[0] == figures
