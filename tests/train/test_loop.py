"""Whole runs on the tiny model: what they write, and that interrupting them changes nothing."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.base.load import load_model
from veneer.disk.tensors import TensorWriter
from veneer.errors import DiskError
from veneer.recipe.load import load_recipe, write_recipe
from veneer.recipe.settings import Recipe
from veneer.train import loop
from veneer.train.events import Event
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]


def weights(recipe: Recipe) -> bytes:
    return (Path(recipe.run) / "adapter" / "adapter_model.safetensors").read_bytes()


def events(recipe: Recipe, kind: str = "step") -> list[dict[str, Any]]:
    lines = (Path(recipe.run) / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def checkpoints(recipe: Recipe) -> list[str]:
    return sorted(p.name for p in (Path(recipe.run) / "checkpoints").glob("*"))


def interrupt_after(step: int, times: int = 1) -> Callable[[Event], None]:
    """A listener that presses Ctrl-C while this step is told of."""

    def press(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return press


def interrupted(recipe: Recipe, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe, [interrupt_after(step)])


def test_a_run_learns_and_says_what_it_did(job: Make, rows: Path) -> None:
    method = {"name": "lora", "rank": 8}
    recipe = job(**{"train.steps": 30, "data": {"train": str(rows), "rows": 6, "eval": str(rows)}, "method": method})
    told: list[Event] = []
    outcome, job_done = train_recipe(recipe, [told.append])
    assert job_done is not None
    assert [e["step"] for e in events(recipe)] == [e.step for e in told if e.kind == "step"] == list(range(1, 31))
    assert events(recipe)[-1]["loss"] < 0.5 * events(recipe)[0]["loss"]
    assert [e["step"] for e in events(recipe, "evaluation")] == [30]
    assert outcome.loss == pytest.approx(sum(e["loss"] for e in events(recipe)[-3:]) / 3)
    assert (outcome.steps, outcome.resumed_from) == (30, None)
    assert outcome.trained_parameters == sum(p.numel() for p in job_done.adapter.parameters())
    assert outcome.adapter_bytes == sum(f.stat().st_size for f in Path(outcome.adapter).iterdir())
    assert outcome.tokens_per_second == pytest.approx(sum(e["tokens"] for e in events(recipe)) / outcome.seconds)
    facts = json.loads((Path(outcome.adapter) / "veneer.json").read_text())
    assert facts["metrics"] == {"loss": outcome.loss, "eval_loss": outcome.eval_loss}
    layouts = {"prompt -> completion": 6}
    assert facts["data"] == {"sha256": job_done.job.data_hash, "rows": 6, "layouts": layouts}


@pytest.mark.parametrize("recompute", [False, True])
def test_detached_the_model_is_what_it_was(job: Make, recompute: bool) -> None:
    recipe = job(**{"train.recompute": recompute, "train.steps": 2})
    _, done = train_recipe(recipe)
    assert done is not None
    assert not any(d.training for d in done.adapter.deltas.values())
    fresh = load_model(recipe.model, dtype="float32").network
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert not torch.equal(done.base.network(input_ids=ids).logits, fresh(input_ids=ids).logits)
        done.adapter.detach()
        assert torch.equal(done.base.network(input_ids=ids).logits, fresh(input_ids=ids).logits)
    want = fresh.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in done.base.network.state_dict().items())
    assert not any(p.requires_grad for p in done.base.network.parameters())
    assert done.base.network.config._attn_implementation == fresh.config._attn_implementation
    assert [m.training for m in done.base.network.modules()] == [m.training for m in fresh.modules()]


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(job: Make) -> None:
    same, again, other = job("a"), job("b"), job("c", **{"train.seed": 1})
    for recipe in (same, again, other):
        train_recipe(recipe)
    assert weights(same) == weights(again) != weights(other)


@pytest.mark.parametrize(
    "changes",
    [{"train.eval_every": 1}, {"train.recompute": True}, {"train.checkpoint_every": 1}, {"train.checkpoint_every": 0}],
    ids=str,
)
def test_watching_a_run_does_not_change_it(job: Make, rows: Path, changes: dict[str, Any]) -> None:
    plain, watched = job("plain", **{"data.eval": str(rows)}), job("watched", **{"data.eval": str(rows), **changes})
    train_recipe(plain)
    train_recipe(watched)
    assert weights(plain) == weights(watched)


def test_packing_changes_the_speed_alone(job: Make) -> None:
    changes: dict[str, Any] = {"method": {"name": "lora", "rank": 4}}
    packed, single = job("packed", **changes), job("single", **changes, **{"data.packing": False})
    train_recipe(packed)
    train_recipe(single)
    for a, b in zip(events(packed), events(single), strict=True):
        assert (a["tokens"], a["supervised"]) == (b["tokens"], b["supervised"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("stops", [[1], [3], [5], [6], [2, 4]], ids=str)
def test_interrupted_and_started_again_it_ends_with_the_same_bytes(job: Make, rows: Path, stops: list[int]) -> None:
    """Two steps and a half are an epoch; dropout draws chance in every step."""
    changes: dict[str, Any] = {"data.eval": str(rows), "train.eval_every": 2, "train.checkpoint_every": 4}
    straight, broken = job("straight", **changes), job("broken", **changes)
    straight_outcome, _ = train_recipe(straight)
    for stop in stops:
        interrupted(broken, stop)
        assert checkpoints(broken) == [f"step-{stop}"]
        assert not (Path(broken.run) / "adapter").exists()
    outcome, _ = train_recipe(broken)
    assert weights(broken) == weights(straight)
    assert [e["step"] for e in events(broken)] == [1, 2, 3, 4, 5, 6]
    assert [e["loss"] for e in events(broken)] == [e["loss"] for e in events(straight)]
    assert [(e["step"], e["loss"]) for e in events(broken, "evaluation")] == [
        (e["step"], e["loss"]) for e in events(straight, "evaluation")
    ]
    assert outcome.resumed_from == max(stops)
    assert (outcome.loss, outcome.eval_loss) == (straight_outcome.loss, straight_outcome.eval_loss)


def test_a_crash_goes_on_from_the_last_checkpoint(job: Make) -> None:
    changes = {"train.checkpoint_every": 2}
    straight, broken = job("straight", **changes), job("broken", **changes)
    train_recipe(straight)

    def crash(event: Event) -> None:
        if event.step == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_recipe(broken, [crash])
    assert [e["step"] for e in events(broken)] == [1, 2, 3, 4, 5]
    said: list[str] = []
    outcome, _ = train_recipe(broken, say=said.append)
    assert outcome.resumed_from == 4
    assert said[-1] == "resuming after step 4"
    assert [e["step"] for e in events(broken)] == [1, 2, 3, 4, 5, 6]
    assert weights(broken) == weights(straight)


def test_a_second_press_stops_at_once(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"train.checkpoint_every": 2}
    straight, broken = job("straight", **changes), job("broken", **changes)
    train_recipe(straight)
    step = loop.optimizer_step

    def pressed_twice(training: Any, state: Any) -> dict[str, Any]:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(training, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "optimizer_step", pressed_twice)
        train_recipe(broken)
    assert [e["step"] for e in events(broken)] == [1, 2, 3]
    assert checkpoints(broken) == ["step-2"]
    train_recipe(broken)
    assert weights(broken) == weights(straight)


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"train.checkpoint_every": 2}
    straight, broken = job("straight", **changes), job("broken", **changes)
    train_recipe(straight)
    write = TensorWriter.write

    def filling(writer: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        if (Path(broken.run) / "checkpoints" / "step-2").exists() and name == "random":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, name, tensor)

    with monkeypatch.context() as patch, pytest.raises(DiskError, match=r"the disk is full: .*step-4"):
        patch.setattr(TensorWriter, "write", filling)
        train_recipe(broken)
    assert checkpoints(broken) == ["step-2"]
    train_recipe(broken)
    assert weights(broken) == weights(straight)


def test_the_newest_checkpoints_are_kept(job: Make) -> None:
    recipe = job(**{"train.checkpoint_every": 1, "train.keep_checkpoints": 2})
    train_recipe(recipe)
    assert checkpoints(recipe) == ["step-4", "step-5"]  # after the last step there is the adapter


KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from veneer.train.run import train_recipe
from veneer.recipe.load import load_recipe

torch.set_num_threads(1)
recipe, rng, kills = load_recipe(sys.argv[1]), random.Random(int(sys.argv[2])), 0
while True:
    child = os.fork()
    if child == 0:
        train_recipe(recipe)
        os._exit(0)
    if kills < 6:
        time.sleep(rng.uniform(0.1, 0.6))
    ended, status = os.waitpid(child, os.WNOHANG if kills < 6 else 0)
    if ended:
        sys.exit(f"{kills} kills" if os.waitstatus_to_exitcode(status) == 0 else "failed")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(job: Make, tmp_path: Path) -> None:
    """One process loads torch, its children train and are killed by SIGKILL, at up to 6 random moments."""
    changes = {"train.checkpoint_every": 1, "train.steps": 8}
    straight, broken = job("straight", **changes), job("broken", **changes)
    train_recipe(straight)
    (tmp_path / "recipe.yaml").write_text(write_recipe(broken))
    arguments = [KILLED_AGAIN_AND_AGAIN, str(tmp_path / "recipe.yaml"), str(random.randrange(1000))]
    ended = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.stderr.splitlines()[-1].endswith(" kills"), (arguments[2], ended.stderr)
    assert [e["step"] for e in events(broken)] == list(range(1, 9)), arguments[2]
    assert weights(broken) == weights(straight), arguments[2]


def test_ctrl_c_to_the_command_and_the_same_command_again(job: Make, tmp_path: Path) -> None:
    """In a process of its own, at whatever step it is when the signal comes."""
    steps = 60
    straight, broken = job("straight", **{"train.steps": steps}), job("broken", **{"train.steps": steps})
    (tmp_path / "recipe.yaml").write_text(write_recipe(broken))
    command = [sys.executable, "-m", "veneer", "train", str(tmp_path / "recipe.yaml")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = Path(broken.run) / "events.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 1
    assert "interrupted" in said
    done = len(events(broken))
    assert 3 <= done < steps
    assert checkpoints(broken) == [f"step-{done}"]
    outcome, _ = train_recipe(load_recipe(tmp_path / "recipe.yaml"))
    assert outcome.resumed_from == done
    assert [e["step"] for e in events(broken)] == list(range(1, steps + 1))
    train_recipe(straight)
    assert weights(broken) == weights(straight)
