"""From rows to a merged model, each step by its command, checked by transformers and peft rather than by ourselves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import recipe_text
from tests.methods.parity import fresh, logits, peft_loads
from veneer.adapters.attach import load_adapter
from veneer.cli.main import invoke

LEARNS = {
    "data.eval": "rows.jsonl",
    "method.rank": 8,
    "method.targets": ["embed_tokens", "lm_head", "down_proj", "q_proj", "v_proj"],  # tied in the model, apart here
    "optimizer.lr": 0.03,
    "train.steps": 90,
    "train.tokens_per_step": 256,
}
"""Enough for a random model to learn eight answers by heart."""

Asked = Callable[..., dict[str, Any]]


@pytest.fixture
def asked(home: Path, capsys: pytest.CaptureFixture[str]) -> Asked:
    """Run a command line with --json; its stdout has to be one JSON object on one line and nothing else."""

    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert invoke([*arguments, "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.out.endswith("}\n") and captured.out.count("\n") == 1, captured.out
        result: dict[str, Any] = json.loads(captured.out)
        return result

    return run


def test_rows_to_merged_model(asked: Asked, home: Path, tiny_model: Path) -> None:
    (home / "recipe.yaml").write_text(recipe_text(tiny_model, **LEARNS))

    data = asked("data", "recipe.yaml")
    assert data["train"]["rows"] == data["eval"]["rows"] == 40

    trained = asked("train", "recipe.yaml")
    assert trained["steps"] == 90 and trained["adapter"] == "run/adapter"
    losses = [e["loss"] for line in (home / "run" / "events.jsonl").read_text().splitlines()
              if (e := json.loads(line))["event"] == "step"]  # fmt: skip
    assert len(losses) == 90 and trained["loss"] < losses[0] / 10, "it learned the rows by heart"

    measured = asked("eval", "run", "--metric", "loss,exact_match", "--max-tokens", "12")
    assert measured["metrics"]["loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)
    assert measured["before"]["loss"] > 2 and measured["before"]["exact_match"] == 0
    assert measured["metrics"]["exact_match"] > 0.9 and measured["rows"] == 40

    prompt = ("--prompt", "how many 3?", "--dtype", "float32")
    assert asked("generate", str(tiny_model), *prompt, "--adapter", "run/adapter")["text"] == "SELECT 3"
    assert asked("generate", str(tiny_model), *prompt, "--max-tokens", "12")["text"] != "SELECT 3"

    merged = asked("merge", str(tiny_model), "--adapter", "run/adapter", "--into", "merged")
    assert merged["greedy_agreement"] == 1.0 and merged["max_drift"] < 1e-3 and merged["rows"] == 40
    assert asked("generate", "merged", *prompt)["text"] == "SELECT 3"

    model = fresh(tiny_model)
    plain, state = logits(model), {k: t.clone() for k, t in model.state_dict().items()}
    adapter = load_adapter(model, home / "run" / "adapter")
    want = logits(model)
    assert float((want - plain).norm() / plain.norm()) > 0.1
    assert float((logits(fresh(home / "merged")) - want).norm() / want.norm()) <= 1e-5
    assert float((logits(peft_loads(tiny_model, home / "run" / "adapter")) - want).abs().max()) <= 1e-4

    adapter.detach()
    after = model.state_dict()
    assert torch.equal(logits(model), plain) and list(after) == list(state)
    assert all(torch.equal(after[k], t) for k, t in state.items()), "detached, the model is bit-identical"

    assert asked("train", "recipe.yaml") == trained, "the same command says it is done"


def test_json_when_something_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["train", "recipe.yaml", "--json", "--model", "nowhere/at/all"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "there is no model 'nowhere/at/all'" in captured.err


def test_the_figures_of_a_run_are_numbers(asked: Asked) -> None:
    figures = asked("train", "recipe.yaml")
    assert all(
        math.isfinite(figures[k]) and figures[k] > 0 for k in ("loss", "seconds", "peak_bytes", "tokens_per_second")
    )
