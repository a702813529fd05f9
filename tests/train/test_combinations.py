"""Prompts in a recipe, alone and beside a method: what is trained, saved, resumed, measured and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import mean_loss
from tests.train.test_loop import events, interrupted
from veneer.adapters.attach import load_adapter
from veneer.base.load import load_model
from veneer.cli.main import invoke
from veneer.errors import ConfigError
from veneer.recipe.load import load_recipe, parse_flags, recipe_from, write_recipe
from veneer.recipe.settings import Recipe
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
LORA = {"name": "lora", "rank": 4, "dropout": 0.2}
TREE: dict[str, Any] = {"model": "m", "run": "r", "data": {"train": "x"}}


def tensors(folder: str | Path) -> dict[str, bytes]:
    return {f.parent.name: f.read_bytes() for f in Path(folder).rglob("adapter_model.safetensors")}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("prompt", ["prompt", "prefix"])
@pytest.mark.parametrize("method", [{"name": "none"}, LORA], ids=["alone", "lora"])
def test_it_learns_and_is_the_same_after_an_interruption(
    job: Make, rows: Path, method: dict[str, Any], prompt: str, packing: bool
) -> None:
    more = {"data.packing": packing, "data.eval": str(rows), "optimizer.lr_prompt": 0.1, "train.eval_every": 1}
    whole, broken = (
        job(name, method=method, prompt={"name": prompt, "tokens": 5}, **more) for name in ("whole", "broken")
    )
    outcome, ready = train_recipe(whole)
    assert ready is not None
    losses = [e["loss"] for e in events(whole, "evaluation")]
    assert losses[-1] < losses[0]
    rates = events(whole)[0]["lr"]
    assert rates["prompt full"] == pytest.approx(0.1) and set(rates) <= {"prompt full", "in", "out"}
    interrupted(broken, 3)
    assert train_recipe(broken)[0].resumed_from == 3
    assert tensors(broken.run + "/adapter") == tensors(outcome.adapter)
    assert len(tensors(outcome.adapter)) == (1 if method["name"] == "none" else 2)
    loaded = load_model(whole.model, dtype="float32")
    change = load_adapter(loaded.network, outcome.adapter)
    assert change.n_params() == outcome.trained_parameters
    assert mean_loss(loaded.network, ready.job.held_out, whole) == pytest.approx(losses[-1], abs=1e-6)


def test_verbs_take_what_was_trained(job: Make, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = job(method=LORA, prompt={"name": "prefix", "tokens": 5}, storage={"name": "nf4"}, **{"train.steps": 2})
    train_recipe(recipe)
    adapter = f"{recipe.run}/adapter"
    asked = ["generate", recipe.model, "--prompt", "city", "--max-tokens", "4", "--json"]
    assert invoke([*asked, "--adapter", adapter]) == 0
    assert invoke(asked) == 0
    with_it, without = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert with_it["text"] != without["text"]
    assert invoke(["eval", recipe.run, "--data", str(rows), "--metric", "loss", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["metrics"]["loss"] > 0
    into = Path(recipe.run).parent / "merged"
    assert invoke(["merge", recipe.model, "--adapter", adapter, "--into", str(into)]) == 2
    assert "lora + prefix: tokens in front of the text are no change of a weight" in capsys.readouterr().err
    assert not into.exists()


def test_a_prompt_without_a_word_about_a_method_is_trained_alone() -> None:
    for tree in ({"prompt": "prefix"}, {"prompt": {"name": "prefix", "tokens": 20}}):
        recipe = recipe_from(TREE | tree)
        assert (recipe.method.name, recipe.prompt.name) == ("none", "prefix")
        assert recipe_from_text(write_recipe(recipe)) == recipe
    assert recipe_from(TREE | {"prompt": "prefix", "method": "lora"}).method.name == "lora"
    assert recipe_from(TREE | {"prompt": "prefix", "method": {"rank": 4}}).method.name == "lora"
    assert recipe_from(TREE | {"prompt": "none"}).method.name == "lora"
    assert recipe_from(TREE).prompt.name == "none"


def recipe_from_text(text: str) -> Recipe:
    import yaml

    return recipe_from(yaml.safe_load(text))


def test_flags(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nrun: r\ndata: {train: x}\nmethod: lora\n")
    flags = ["--prompt", "prefix", "--prompt.tokens", "7", "--optimizer.lr_prompt", "0.1"]
    recipe = load_recipe(tmp_path / "r.yaml", parse_flags(flags))
    assert (recipe.method.name, recipe.prompt.name, recipe.prompt.own) == ("lora", "prefix", {"tokens": 7})
    assert load_recipe(tmp_path / "r.yaml", parse_flags([*flags, "--method", "none"])).method.name == "none"


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"method": "none"}, "recipe: method is none and there is no prompt, so nothing would be trained"),
        ({"method": {"name": "none", "rank": 4, "targets": ["q"]}, "prompt": "prefix"},
         "recipe: method.rank is given, but method is none; leave it out\n"
         "recipe: method.targets is given, but method is none; leave it out"),
        ({"prompt": {"tokens": 4}}, r"recipe: prompt.tokens is given, but no prompt.name; name one (prompt, prefix)"),
        ({"prompt": "prefxi"}, "recipe: there is no prompt 'prefxi'. Did you mean 'prefix'? Known: prefix, prompt."),
        ({"prompt": {"name": "prefix", "length": 4}}, "recipe: prompt prefix has no setting 'length'. It has: tokens."),
        ({"prompt": {"name": "prompt", "tokens": 0}}, "recipe: prompt.tokens must be at least 1, got 0"),
        ({"prompt": {"name": "prompt", "tokens": "a"}},
         "recipe: prompt.tokens is 'a': input should be a valid integer, unable to parse string as an integer"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_not_ask(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from(TREE | tree)
    assert str(caught.value) == said


def test_a_row_that_is_too_long_with_the_prompt_in_front(job: Make, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "city " * 250}) + "\n")
    data = {"data.train": str(tmp_path / "long.jsonl"), "data.too_long": "truncate", "train.max_length": 250}
    with pytest.raises(ConfigError, match=r"250 tokens and 10 of the prompt in front, but the model reads at most 256; "
                                          r"set train.max_length to 246"):  # fmt: skip
        train_recipe(job(prompt={"name": "prefix", "tokens": 10}, **data))


def test_texts_that_reach_beyond_the_last_position(tiny_model: Path) -> None:
    from tests.methods.parity import fresh
    from veneer.adapters.attach import attach
    from veneer.errors import DataError
    from veneer.prompts.base import config_from

    model = fresh(tiny_model)
    attach(model, None, prompt=config_from("prefix", {"tokens": 10}))
    model(torch.ones(1, 246, dtype=torch.int64))
    with pytest.raises(DataError, match="10 tokens of the prefix in front, a text reaches position 256, but"):
        model(torch.ones(1, 247, dtype=torch.int64))


@pytest.mark.parametrize("prompt", ["prompt", "prefix"])
def test_on_a_base_whose_embeddings_are_quantized_too(job: Make, prompt: str) -> None:
    storage = {"name": "nf4", "embeddings": True}
    recipe = job(prompt={"name": prompt, "tokens": 3}, method={"name": "none"}, storage=storage, **{"train.steps": 2})
    outcome, ready = train_recipe(recipe)
    assert ready is not None and outcome.trained_parameters == 3 * {"prompt": 32, "prefix": 2 * 2 * 2 * 8}[prompt]
