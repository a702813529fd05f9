"""A run's folder: taken for one recipe, told apart from other folders, its files whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.disk.run_dir import HEADER, RunDir
from veneer.errors import ConfigError, DiskError

RECIPE = "model: a\ntrain:\n  steps: 3\n  seed: 0\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "x")


def checkpoint(run: RunDir, step: int) -> Path:
    run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(step) / "state.json").write_text("{}")
    return run.checkpoint(step)


def test_a_folder_is_taken_for_a_recipe_and_taken_again_for_the_same(run: RunDir) -> None:
    run.begin(RECIPE)
    assert run.recipe.read_text() == HEADER + RECIPE
    checkpoint(run, 2)
    run.begin(RECIPE)


def test_another_recipe_is_refused_key_by_key(run: RunDir) -> None:
    run.begin(RECIPE)
    run.append({"step": 1})
    other = RECIPE.replace("steps: 3", "steps: 4") + "data: {eval: null}\n"
    with pytest.raises(ConfigError) as caught:
        run.begin(other)
    assert str(caught.value).splitlines() == [
        f"{run.root} holds a run of another recipe:",
        "  train.steps is 3 there, 4 here",
        "  data.eval is absent there, None here",
        "Give this recipe another folder (run: ...), or remove that one.",
    ]
    assert run.recipe.read_text() == HEADER + RECIPE


def test_another_spelling_of_the_same_recipe_is_taken_and_written_anew(run: RunDir) -> None:
    run.begin(RECIPE)
    run.append({"step": 1})
    new = RECIPE.replace("steps", "optimizer_steps")
    with pytest.raises(ConfigError, match=r"train.optimizer_steps is absent there, 3 here"):
        run.begin(new)
    run.begin(new, lambda text: text.replace("steps", "optimizer_steps"))
    assert run.recipe.read_text() == HEADER + new


@pytest.mark.parametrize("trained", ["checkpoint", "event", "result"])
def test_only_a_run_without_a_step_makes_room(run: RunDir, trained: str) -> None:
    run.begin(RECIPE)
    run.begin(RECIPE + "run: x\n")  # the first one failed before its first step, and was corrected
    assert run.recipe.read_text() == HEADER + RECIPE + "run: x\n"
    if trained == "checkpoint":
        checkpoint(run, 1)
    elif trained == "event":
        run.append({"step": 1})
    else:
        run.finish({})
    with pytest.raises(ConfigError, match="another recipe"):
        run.begin(RECIPE)


def test_a_folder_of_something_else_is_left_alone(run: RunDir) -> None:
    run.root.mkdir(parents=True)
    (run.root / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"runs/x holds other files \(thesis.tex\); give the run a folder"):
        run.begin(RECIPE)
    assert [p.name for p in run.root.iterdir()] == ["thesis.tex"]


def test_a_recipe_that_the_user_wrote_there_is_not_replaced(run: RunDir) -> None:
    run.root.mkdir(parents=True)
    run.recipe.write_text(RECIPE)
    with pytest.raises(ConfigError, match=r"holds other files \(recipe.yaml\)"):
        run.begin(RECIPE)
    assert run.recipe.read_text() == RECIPE


def test_what_a_killed_start_left_is_no_obstacle(run: RunDir) -> None:
    run.root.mkdir(parents=True)
    (run.root / ".recipe.yaml.0a1b2c3d.tmp").touch()
    run.begin(RECIPE)
    assert run.recipe.exists()


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    run = RunDir(tmp_path / "x")
    with pytest.raises(DiskError, match="x cannot be a run's folder: File exists"), run.locked():
        pass
    with (
        pytest.raises(DiskError, match="x/y cannot be a run's folder: Not a directory"),
        RunDir(tmp_path / "x" / "y").locked(),
    ):
        pass


def test_a_folder_that_cannot_be_made() -> None:
    """/proc takes no folders, whoever asks; permissions would not stop root."""
    with pytest.raises(DiskError, match=r"/proc/x cannot be a run's folder: "), RunDir("/proc/x").locked():
        pass


def test_one_process_at_a_time(run: RunDir) -> None:
    code = f"from veneer.disk.run_dir import RunDir\nwith RunDir({str(run.root)!r}).locked(): print('mine')"
    with run.locked():
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"ConfigError: another process is training in {run.root}; wait for it, or stop it" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "mine\n"


def test_a_file_system_without_locks_trains_all_the_same(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with run.locked():
        assert run.root.is_dir()


def test_a_run_is_done_when_it_has_figures(run: RunDir) -> None:
    run.begin(RECIPE)
    assert run.done() is None
    run.finish({"steps": 3})
    assert run.done() == {"steps": 3}
    run.result.write_text('{"steps": ')
    with pytest.raises(DiskError, match=r"result.json is damaged .*; remove it to end the run again"):
        run.done()


def test_events_after_a_step_are_forgotten_and_half_a_line_too(run: RunDir) -> None:
    run.begin(RECIPE)
    for step in (1, 2, 3):
        run.append({"event": "step", "step": step})
    run.append({"event": "evaluation", "step": 2})
    with run.events.open("a") as file:
        file.write('{"event": "step", "st')
    run.rewind(2)
    kept = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert kept == run.read_events()
    assert [(e["event"], e["step"]) for e in kept] == [("step", 1), ("step", 2), ("evaluation", 2)]
    run.rewind(0)
    assert run.events.read_text() == ""


def test_events_that_cannot_be_written(run: RunDir) -> None:
    run.begin(RECIPE)
    run.events.mkdir()
    with pytest.raises(DiskError, match=r"events.jsonl was not written: Is a directory. The last checkpoint is whole."):
        run.append({"step": 1})


def test_the_newest_checkpoint_and_what_is_none(run: RunDir) -> None:
    assert run.newest_checkpoint() is None
    for step in (9, 10, 2):
        checkpoint(run, step)
    (run.checkpoints / "step-backup").mkdir()
    (run.checkpoints / "step-99").touch()
    (run.checkpoints / ".step-100.0a1b.tmp").mkdir()
    assert run.newest_checkpoint() == run.checkpoint(10)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "step-10",
        "step-2",
        "step-9",
        "step-99",
        "step-backup",
    ]


def test_the_newest_are_kept(run: RunDir) -> None:
    for step in (9, 10, 2, 30):
        checkpoint(run, step)
    run.prune(2)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-10", "step-30"]
    run.prune(5)
    assert len(list(run.checkpoints.iterdir())) == 2


def test_what_was_picked_is_kept_until_nothing_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.picked() == {}
    run.root.mkdir()
    run.pick({"train.recompute": True})
    assert RunDir(run.root).picked() == {"train.recompute": True}
    run.changes.write_text("{")
    with pytest.raises(DiskError, match=r"picked\.json is damaged .*; write into it what recipe\.yaml has"):
        run.picked()
    run.pick({})
    assert run.picked() == {} and not run.changes.exists()
