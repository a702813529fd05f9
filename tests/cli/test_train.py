"""`veneer train`: flags over a recipe, what it prints for people and for programs, and progress on stderr alone."""

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import veneer.cli.console as console_module
import veneer.cli.train as train_module
from veneer.cli.console import remark
from veneer.cli.main import invoke
from veneer.cli.train import TrainProgress
from veneer.recipe.load import keys
from veneer.train.events import Event

KEYS = {"adapter", "adapter_bytes", "steps", "seconds", "peak_bytes", "loss", "tokens_per_second",
        "trained_parameters", "eval_loss", "resumed_from", "picked", "folder"}  # fmt: skip


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> str:
    rows = [{"question": f"how many {n}?", "sql": f"SELECT {n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "prompt": "{question}", "completion": "{sql}"}
    tree = {
        "model": str(tiny_model),
        "run": str(tmp_path / "run"),
        "data": data,
        "method": {"rank": 2},
        "train": {"steps": 4, "tokens_per_step": 64, "max_length": 64, "dtype": "float32"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    return str(tmp_path / "recipe.yaml")


def test_json_is_all_of_stdout_and_progress_is_on_stderr(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["train", recipe, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert set(result) == KEYS and captured.out.count("\n") == 1
    assert result["steps"] == 4 and result["resumed_from"] is None and result["eval_loss"] is None
    assert result["adapter"] == str(tmp_path / "run" / "adapter") and result["seconds"] > 0
    assert result["adapter_bytes"] == sum(f.stat().st_size for f in Path(result["adapter"]).iterdir())
    lines = captured.err.splitlines()
    assert lines[0].startswith("reading ") and lines[1].startswith("loading ")
    assert lines[2].startswith("step 1/4: loss ") and lines[-1].startswith("step 4/4: loss ")
    assert len(lines) == 4, "one line a minute, the first step and the last"


def test_for_people_and_again(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / ("[red] a long name " + "x" * 80)
    flags = ["--run", str(run), "--data.eval", str(tmp_path / "rows.jsonl"), "--train.steps=2"]
    assert invoke(["train", recipe, *flags]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first.startswith("2 steps in ") and ", evaluation loss " in first and ", peak memory " in first
    assert second.startswith(f"adapter: {run}/adapter (")
    assert "step 2: evaluation loss" in captured.err
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert invoke(["train", recipe, *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [first, second] and captured.err == f"{run} is done already\n"
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_flags_outrank_the_recipe_and_reach_the_method(recipe: str, tmp_path: Path) -> None:
    assert invoke(["train", recipe, "--method.rank", "3", "--lora_alpha", "6", "--max_steps", "1"]) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == 1


def test_ctrl_c_says_how_to_go_on(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_two(self: TrainProgress, event: Event) -> None:
        if event.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainProgress, "__call__", after_two)
    handler = signal.getsignal(signal.SIGINT)
    assert invoke(["train", recipe, "--json"]) == 1
    captured = capsys.readouterr()
    run = tmp_path / "run"
    assert captured.err.splitlines()[-1] == f"veneer: interrupted. The same command resumes the run in {run}."
    assert captured.out == "" and not (run / "adapter").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert invoke(["train", recipe, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["resumed_from"] == 2 and "resuming after step 2" in captured.err
    assert invoke(["train", recipe, "--run", str(tmp_path / "whole")]) == 0
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.steps", "3"], "the recipe comes first: veneer train RECIPE --train.steps"),
        (["absent.yaml"], "there is no recipe absent.yaml"),
        (["RECIPE", "--train.stesp", "3"], "there is no key --train.stesp. Did you mean 'train.steps'"),
        (["RECIPE", "--train.steps"], "--train.steps needs a value, like --train.steps VALUE"),
        (["RECIPE", "--method.rnak", "3"], "has no setting 'rnak'. Did you mean 'rank'?"),
        (["RECIPE", "more"], "'more' is no flag; recipe keys are given like --train.steps 50"),
    ],
)
def test_bad_flags(
    recipe: str, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["train", *(recipe if a == "RECIPE" else a for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert not (tmp_path / "run").exists()


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, words in keys().items():
        assert f"--{key} {words}" in text
    assert "veneer train recipe.yaml --train.epochs 2 --optimizer.lr 1e-3" in text


def event(step: int, kind: str = "step", **figures: Any) -> Event:
    return Event(kind, step, 4, {"loss": 1.5, "tokens_per_second": 80.0, "rss_bytes": 2**30, **figures})


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    """Let the progress write to a text of its own, as on a terminal or not."""

    def install(terminal: bool) -> io.StringIO:
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120, highlight=False)
        for module in (train_module, console_module):
            monkeypatch.setattr(module, "stderr", console)
        return text

    return install


def test_elsewhere_a_line_a_minute(shown: Callable[[bool], io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    text, now = shown(False), [5.0]
    monkeypatch.setattr(train_module.time, "monotonic", lambda: now[0])
    with TrainProgress() as progress:
        for step, at in ((1, 5.0), (2, 64.0), (3, 66.0), (4, 67.0)):
            now[0] = at
            progress(event(step))
        progress(event(4, "evaluation", perplexity=4.48))
    lines = text.getvalue().splitlines()
    assert lines[:3] == [f"step {n}/4: loss 1.500  80 tokens/s  1 GiB" for n in (1, 3, 4)]
    assert lines[3:] == ["step 4: evaluation loss 1.5000, perplexity 4.48"]


def test_on_a_terminal_a_bar(shown: Callable[[bool], io.StringIO]) -> None:
    text = shown(True)
    with TrainProgress() as progress:
        remark("reading rows.jsonl [all]")
        for step in range(1, 5):
            progress(event(step))
    written = text.getvalue()
    assert "reading rows.jsonl [all]" in written and "4/4" in written and "80 tokens/s" in written


def test_nothing_is_shown_of_a_run_that_never_began(shown: Callable[[bool], io.StringIO]) -> None:
    text = shown(False)
    with TrainProgress():
        pass
    assert text.getvalue() == ""
