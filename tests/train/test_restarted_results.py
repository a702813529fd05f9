"""What restarts leave is an adapter like any other: merged, measured, asked, exported, read by PEFT; and other settings
beside restarts do what they do without them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import mean_loss
from tests.methods.parity import fresh, logits, peft_loads
from tests.train.test_combinations import tensors
from tests.train.test_loop import events, interrupted
from veneer.adapters.attach import load_adapter
from veneer.base.load import load_model
from veneer.cli.main import invoke
from veneer.recipe.settings import Recipe
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
Said = pytest.CaptureFixture[str]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 2, "alpha": 8.0},
    "dora": {"name": "dora", "rank": 2},
    "mora": {"name": "mora", "rank": 2, "variant": "sharing"},
}
TWICE = {"every": 2, "warmup": 1}


def asked(said: Said, *words: str) -> dict[str, Any]:
    """The JSON that a command ends with."""
    assert invoke([*words, "--json"]) == 0, said.readouterr().err
    found: dict[str, Any] = json.loads(said.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_verbs_take_what_was_trained(job: Make, rows: Path, tmp_path: Path, capsys: Said, method: str) -> None:
    recipe = job(method=METHODS[method], restarts=TWICE, **{"data.eval": str(rows)})
    outcome, _ = train_recipe(recipe)
    capsys.readouterr()
    use = [recipe.model, "--adapter", outcome.adapter]
    said = [asked(capsys, "generate", *w, "--prompt", "city", "--max-tokens", "6") for w in (use, use[:1])]
    assert said[0]["text"] != said[1]["text"]
    measured = asked(capsys, "eval", recipe.run, "--data", str(rows), "--metric", "loss")
    assert measured["metrics"]["loss"] == pytest.approx(outcome.eval_loss, abs=1e-5)
    merged = str(tmp_path / "merged")
    assert asked(capsys, "merge", *use, "--into", merged)["max_drift"] < 1e-4
    model = fresh(Path(recipe.model))
    load_adapter(model, outcome.adapter)
    assert float((logits(fresh(Path(merged))) - logits(model)).abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_peft_says_the_same(job: Make, tmp_path: Path, capsys: Said, method: str) -> None:
    """LoRA's folder as it is; MoRA's squares of several groupings as the LoRA that they are together."""
    recipe = job(method=METHODS[method], restarts=TWICE)
    outcome, _ = train_recipe(recipe)
    capsys.readouterr()
    model, folder = fresh(Path(recipe.model)), Path(outcome.adapter)
    plain = logits(model)
    load_adapter(model, folder)
    assert float((logits(model) - plain).abs().max()) > 0.1
    if method == "mora":
        given = ["export", recipe.model, "--adapter", str(folder)]
        assert invoke([*given, "--to", "peft", "--into", str(tmp_path / "peft")]) == 2
        assert "PEFT has no word for mora; --to lora makes a LoRA of it" in capsys.readouterr().err
        folder = tmp_path / "lora"
        made = asked(capsys, *given, "--to", "lora", "--into", str(folder))
        assert made["exact"] and made["rank"] == 3 * round((3 * 32 * 2) ** 0.5)  # three groupings; D + O = 96
    assert float((logits(peft_loads(Path(recipe.model), folder)) - logits(model)).abs().max()) < 1e-4


@pytest.mark.parametrize("reset", ["zero", "magnitude"])
def test_state_in_8_bits(job: Make, rows: Path, reset: str) -> None:
    """Pruned and resumed as in 32 bits, to about the same loss."""
    more = {"data.eval": str(rows), "train.steps": 8, "train.eval_every": 8}
    settings = {"method": METHODS["lora"], "restarts": {**TWICE, "reset": reset}, **more}
    losses = [train_recipe(job(f"{bits}", **{**settings, "optimizer.bits": bits}))[0].eval_loss for bits in (32, 8)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    broken = job("broken", **{**settings, "optimizer.bits": 8})
    for step in (3, 4):  # in the middle of a cycle, and where the next begins
        interrupted(broken, step)
    train_recipe(broken)
    assert tensors(broken.run + "/adapter") == tensors(broken.run.replace("broken", "8") + "/adapter")
    restarts = events(broken, "restart")
    assert [e["step"] for e in restarts] == [2, 4, 6]
    want = {"zero": 1.0, "magnitude": 0.9}[reset]
    assert all(e["pruned"] == pytest.approx(want, abs=0.03) for e in restarts)


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_gradients_used_at_once_end_with_the_same_bytes(job: Make, method: str) -> None:
    """Whose parameters lie in one buffer, which a restart has to write into in place."""
    whole = {"method": METHODS[method], "restarts": TWICE, "train.micro_batch_tokens": 512}
    kept, at_once = job("kept", **whole), job("at-once", **whole, **{"optimizer.in_backward": True})
    assert tensors(train_recipe(kept)[0].adapter) == tensors(train_recipe(at_once)[0].adapter)


@pytest.mark.parametrize("prompt", ["prompt", "prefix"])
@pytest.mark.parametrize("method", ["lora", "mora"])
def test_a_prompt_beside_it_goes_on_through_restarts(job: Make, rows: Path, method: str, prompt: str) -> None:
    settings = {"method": METHODS[method], "prompt": {"name": prompt, "tokens": 3}, "restarts": TWICE}
    whole, broken = (job(run, **settings, **{"data.eval": str(rows)}) for run in ("whole", "broken"))
    outcome, done = train_recipe(whole)
    assert done is not None
    interrupted(broken, 4)
    train_recipe(broken)
    assert tensors(broken.run + "/adapter") == tensors(outcome.adapter)
    assert [e["folded"] > 0 for e in events(whole, "restart")] == [True, True]
    fresh_model = load_model(whole.model, dtype="float32").network
    load_adapter(fresh_model, outcome.adapter)
    assert mean_loss(fresh_model, done.job.held_out, whole) == pytest.approx(outcome.eval_loss, abs=2e-6)
