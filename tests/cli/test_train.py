"""veneer train: starts, goes on, says it is done; flags, messages and exit statuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from veneer.cli.main import invoke
from veneer.train import loop
from veneer.train.recipe import keys


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., str]:
    """Write a recipe of 8 steps over 12 rows and return its path: `recipe("again", **{"train": {...}})`."""

    def write(run: str = "run", **changes: Any) -> str:
        lines = [{"prompt": f"how many {'customers ' * (n % 5)}{n}?", "completion": f"SELECT {n}"} for n in range(12)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tree = {
            "model": str(tiny_model),
            "run": str(tmp_path / run),
            "data": {"train": str(tmp_path / "rows.jsonl")},
            "lora_r": 4,
            "lora_dropout": 0.1,
            "learning_rate": 0.01,
            "train": {"steps": 8, "tokens_per_step": 128, "max_length": 128, "dtype": "float32"},
        }
        file = tmp_path / f"{run}.yaml"
        file.write_text(yaml.safe_dump({**tree, **changes}))
        return str(file)

    return write


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_for_people(recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", recipe()]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("8 steps in ")
    assert "tokens/s), loss " in first
    assert second.startswith(f"adapter: {tmp_path / 'run' / 'adapter'} (")
    assert "step 1/8: loss " in err
    assert "step 8/8: loss " in err
    assert "step 4/8" not in err  # not a line for every step


def test_json_is_one_object_and_the_second_time_says_done(
    recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["train", recipe(), "--json"]) == 0
    first = capsys.readouterr()
    result = json.loads(first.out)
    assert {"adapter", "steps", "seconds", "peak_bytes", "loss", "tokens_per_second"} <= set(result)
    assert (result["steps"], result["resumed_from"]) == (8, None)
    assert invoke(["train", recipe(), "--json"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == result
    assert f"{tmp_path / 'run'} is done already" in again.err
    assert "loading" in first.err
    assert "loading" not in again.err


def test_flags_outrank_the_file(recipe: Callable[..., str], tmp_path: Path) -> None:
    arguments = ["--train.steps", "2", "--lora_r=2", "--optimizer.lr", "1e-3", "--method.targets", "[q_proj]"]
    assert invoke(["train", recipe(), *arguments]) == 0
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (written["train"]["steps"], written["method"]["rank"], written["optimizer"]["lr"]) == (2, 2, 1e-3)
    assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == 2


def test_help_has_every_key_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{key}" in out for key in keys())
    assert "veneer train recipe.yaml" in out


@pytest.mark.parametrize(
    ("arguments", "changes", "status", "message"),
    [
        (["--train.stesp", "3"], {}, 2, "there is no key --train.stesp. Did you mean 'train.steps'"),
        (["--train.steps", "-3"], {}, 2, "--train.steps: train.steps is -3: input should be greater"),
        ([], {"batch_size": 4}, 2, "run.yaml, line 1: batch_size: batches are counted in tokens here"),
        ([], {"model": "/nowhere"}, 2, "/nowhere"),
        (["--data.train", "/nowhere.jsonl"], {}, 2, "/nowhere.jsonl"),
        (["--method.targets", "[q_prj]"], {}, 2, "q_proj"),
        (["--method.rank", "0"], {}, 2, "--method.rank: "),
        (["--run", "/proc/x"], {}, 1, "/proc/x cannot be a run's folder"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_is_wrong_is_said_in_one_message(
    recipe: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    changes: dict[str, Any],
    status: int,
    message: str,
) -> None:
    assert invoke(["train", recipe(**changes), *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert f"there is no recipe {tmp_path / 'recipe.yaml'}." in capsys.readouterr().err
    assert invoke(["train"]) == 2
    assert invoke(["train", "--train.steps", "5"]) == 2
    assert "the recipe comes first: veneer train RECIPE --train.steps" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(
    recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke(["train", recipe("straight")]) == 0
    step = loop.optimizer_step

    def pressed(settings: Any, job: Any, state: Any) -> dict[str, Any]:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(settings, job, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", pressed)
        assert invoke(["train", recipe("broken")]) == 1
    assert f"interrupted. The same command goes on with the run in {tmp_path / 'broken'}." in capsys.readouterr().err
    assert invoke(["train", recipe("broken"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["resumed_from"] == 3
    assert "going on after step 3" in err
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is compared bit by bit with another process has to add up in the same order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_ctrl_c_to_the_real_command(recipe: Callable[..., str], tmp_path: Path) -> None:
    """The same in a process of its own, at whatever step it is when the signal comes."""
    steps = 150
    longer = {"steps": steps, "tokens_per_step": 128, "max_length": 128, "dtype": "float32"}
    running = subprocess.Popen(
        [sys.executable, "-m", "veneer", "train", recipe("broken", train=longer)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    events = tmp_path / "broken" / "events.jsonl"
    while not (events.exists() and len(events.read_text().splitlines()) >= 3):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate()
    assert running.returncode == 1
    assert "interrupted. The same command goes on" in err
    done = len(events.read_text().splitlines())
    assert [p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()] == [f"step-{done}"]
    assert done < steps
    assert invoke(["train", recipe("broken", train=longer)]) == 0
    assert [json.loads(line)["step"] for line in events.read_text().splitlines()] == list(range(1, steps + 1))
    assert invoke(["train", recipe("straight", train=longer)]) == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
