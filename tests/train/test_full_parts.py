"""New tokens and modules trained in full in a recipe: resumed, loaded by PEFT, measured, merged and planned."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import tiny_recipe
from tests.train.test_loop import events, interrupted
from veneer.adapters.attach import attach, load_adapter
from veneer.base.load import load_model
from veneer.cli.main import invoke
from veneer.errors import ConfigError, TargetError
from veneer.methods.base import config_from
from veneer.recipe.load import load_recipe, recipe_from, write_recipe
from veneer.recipe.settings import Recipe
from veneer.train.call import train_attached
from veneer.train.job import read_job
from veneer.train.preflight import preflight
from veneer.train.run import train_recipe

NEW = ["<sql>", "</sql>", "<rows>", "<none>"]
LORA = {"name": "lora", "rank": 4, "dropout": 0.2}
TREE: dict[str, Any] = {"model": "m", "run": "r", "data": {"train": "x"}}
Make = Callable[..., Recipe]


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    """Rows whose answers are written in the new tokens."""
    lines = [{"prompt": f"count {i}", "completion": f"<sql>city {i % 3}</sql><rows>"} for i in range(24)]
    (tmp_path / "sql.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "sql.jsonl"


@pytest.fixture(params=["tiny_model", "tiny_untied"])
def make(request: pytest.FixtureRequest, sql: Path, tmp_path: Path) -> Make:
    def made(run: str, **changes: Any) -> Recipe:
        own = {"method": LORA, "train.steps": 6, "tokens": {"add": NEW}}
        return tiny_recipe(request.getfixturevalue(request.param), sql, tmp_path / run, **{**own, **changes})

    return made


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "more", [{}, {"method": {**LORA, "trained_modules": ["norm"]}}, {"optimizer.lr_embedding": 0.1}]
)
def test_it_learns_and_is_the_same_after_an_interruption(make: Make, sql: Path, more: dict[str, Any]) -> None:
    more = {**more, "data.eval": str(sql), "train.eval_every": 1}
    whole, broken = make("whole", **more), make("broken", **more)
    outcome, training = train_recipe(whole)
    assert training is not None and training.adapter.base.vocab_size == 388
    losses = [e["loss"] for e in events(whole, "evaluation")]
    assert losses[-1] < losses[0]
    interrupted(broken, 3)
    assert train_recipe(broken)[0].resumed_from == 3
    assert weights(broken.run + "/adapter") == weights(outcome.adapter)
    planned = preflight(read_job(whole)).adapter.n_params()
    assert planned == outcome.trained_parameters == training.adapter.n_params()


def test_peft_generation_evaluation_and_a_merge_take_it(
    make: Make, sql: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("run", **{"data.eval": str(sql), "train.steps": 80, "optimizer.lr": 0.03})
    train_recipe(recipe)
    adapter = f"{recipe.run}/adapter"
    base = load_model(recipe.model, dtype="float32")
    load_adapter(base, adapter)
    tokens = torch.tensor([[5, 384, 7, 385, 386, 387]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(recipe.model)
        model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)), mean_resizing=False)
        theirs = peft.PeftModel.from_pretrained(model, adapter).eval()(tokens).logits
        assert float((theirs - base.network(tokens).logits).abs().max()) < 1e-4
    asked = ["generate", recipe.model, "--adapter", adapter, "--prompt", "count 4", "--max-tokens", "8", "--json"]
    assert invoke(asked) == 0
    assert "<sql>" in json.loads(capsys.readouterr().out)["text"]
    assert invoke(["eval", recipe.run, "--metric", "loss", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["metrics"]["loss"] < measured["before"]["loss"]
    assert invoke(["merge", recipe.model, "--adapter", adapter, "--into", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (
        merged.get_input_embeddings().num_embeddings == len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 388
    )
    capsys.readouterr()
    gguf = ["export", recipe.model, "--adapter", adapter, "--to", "gguf", "--into", str(tmp_path / "a.gguf")]
    assert invoke(gguf) == 2
    assert "a LoRA file for llama.cpp cannot hold trained tokens; merge the adapter" in capsys.readouterr().err
    assert invoke(["export", recipe.model, "--adapter", adapter, "--to", "peft", "--into", str(tmp_path / "p")]) == 0
    assert weights(tmp_path / "p") == weights(adapter)


def test_the_names_of_others_are_taken() -> None:
    recipe = recipe_from({**TREE, "tokens": ["<a>"], "modules_to_save": ["lm_head"], "trainable_token_indices": [5]})
    assert recipe.tokens.add == ("<a>",) and recipe.tokens.train == (5,)
    assert recipe.method.trained_modules == ("lm_head",)
    by_module = recipe_from({**TREE, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5, "<a>"]}})
    assert dict(by_module.tokens.train) == {"embed_tokens": (5,), "lm_head": (5, "<a>")}  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"method": "none", "prompt": "prefix", "tokens": ["<a>"]}, "tokens are given, but method is none"),
        ({"method": {"name": "none", "trained_modules": ["norm"]}, "prompt": "prefix"},
         "method.trained_modules is given, but method is none; leave it out"),
        ({"tokens": {"ad": ["<a>"]}}, "there is no key tokens.ad. Did you mean 'add'"),
        ({"added_tokens_overrides": {5: "<a>"}}, "list their texts in tokens.add"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_ask(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe_from(TREE | tree)


def test_a_module_that_the_model_lacks_is_refused_before_weights_are_read(make: Make) -> None:
    with pytest.raises(TargetError, match=r"trained module 'lm_haed' matches no module\. Did you mean 'lm_head'\?"):
        train_recipe(make("run", method={**LORA, "trained_modules": ["lm_haed"]}))


def test_an_adapter_made_in_python_is_trained(tiny_model: Path, sql: Path, tmp_path: Path) -> None:
    base = load_model(tiny_model, dtype="float32")
    lora = config_from("lora", {"rank": 2})
    adapter = attach(base, lora, new_tokens=NEW, trained_tokens=[5], trained_modules=["norm"])
    run = train_attached(
        base, adapter, {"data.train": str(sql), "run": str(tmp_path / "r"), "train.steps": 2}, (), print
    )
    assert run.trained_parameters == adapter.n_params()
    recipe = load_recipe(tmp_path / "r" / "recipe.yaml")
    assert recipe.tokens.add == tuple(NEW) and recipe.method.trained_modules == ("model.norm",)
    assert dict(recipe.tokens.train) == {"embed_tokens": (5,)}  # type: ignore[call-overload]
    assert load_adapter(load_model(tiny_model, dtype="float32"), run.adapter).new_tokens == tuple(NEW)


@pytest.mark.parametrize(
    "more",
    [
        {"restarts": {"every": 2}, "train.warmup": 0},
        {"method": {"name": "adalora", "rank": 4, "target_rank": 2}},
        {"optimizer.in_backward": True, "train.tokens_per_step": 64, "train.micro_batch_tokens": 128},
        {"storage": {"name": "nf4"}, "optimizer.bits": 8, "train.recompute": True},
        {"prompt": {"name": "prefix", "tokens": 3}},
    ],
    ids=["restarts", "adalora", "in-backward", "nf4", "prefix"],
)
def test_it_goes_with_what_else_a_recipe_asks(make: Make, more: dict[str, Any]) -> None:
    recipe = make("run", **{"method": {**LORA, "trained_modules": ["norm"]}, **more})
    outcome, training = train_recipe(recipe)
    assert training is not None and events(recipe)[-1]["loss"] < events(recipe)[0]["loss"]
    base = load_model(recipe.model, storage=recipe.storage.name, dtype="float32")
    again = load_adapter(base, outcome.adapter)
    assert again.new_tokens == tuple(NEW) and base.vocab_size == 388
    tokens = torch.tensor([[5, 384, 7, 387]])
    with torch.no_grad():
        there = training.base.network(tokens).logits
        assert torch.allclose(there, base.network(tokens).logits, atol=1e-4)


def test_plan_counts_it(make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = make("run", method={**LORA, "trained_modules": ["norm"]})
    (tmp_path / "recipe.yaml").write_text(write_recipe(recipe))
    assert invoke(["plan", str(tmp_path / "recipe.yaml"), "--no-time", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert planned["trained_parameters"] == preflight(read_job(recipe)).adapter.n_params()
