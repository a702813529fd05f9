"""The recipes of examples/recipes: one for every method and prompt, and each trains the real model for a few steps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.blocks import ROOT
from veneer.base.load import load_model
from veneer.methods import METHODS
from veneer.prompts import PROMPTS
from veneer.recipe.load import load_recipe
from veneer.recipe.settings import NONE, Recipe
from veneer.train import setup
from veneer.train.run import train_recipe

FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SHORT = {
    "data.train": str(ROOT / "examples" / "tickets.jsonl"),
    "data.rows": 4,
    "train.epochs": None,
    "train.steps": 2,
    "train.tokens_per_step": 64,
    "train.dtype": "float32",
}


def short(path: Path, run: Path) -> Recipe:
    restarting = {"restarts.every": 1} if load_recipe(path).restarts.every else {}
    return load_recipe(path, {**SHORT, **restarting, "run": str(run)})


def test_every_method_and_every_prompt_has_a_recipe(tmp_path: Path) -> None:
    recipes = [short(path, tmp_path) for path in RECIPES]
    assert {r.method.name for r in recipes} - {NONE} == set(METHODS)
    assert {r.prompt.name for r in recipes} - {NONE} == set(PROMPTS)
    assert {r.storage.name for r in recipes} >= {"dense", "nf4"}
    assert {r.prompt.name for r in recipes if r.method.name == "lora"} == {NONE, "prompt", "prefix"}
    assert {r.method.own.get("variant") for r in recipes if r.method.name == "mora"} == {"rotation", "sharing"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_its_first_line_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and f"#   veneer train examples/recipes/{path.name}\n" in text
    assert "arXiv:" in text.splitlines()[0] or path.stem == "full"
    assert load_recipe(path).run == f"runs/{path.stem}"


def test_the_readme_names_the_folder() -> None:
    assert "examples/recipes" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One model a storage for all runs: what is attached is taken off again, which leaves it as it was."""
    kept: dict[Any, Any] = {}

    def load(name: str, **settings: Any) -> Any:
        key = (name, str(settings["storage"]))
        if key not in kept:
            kept[key] = load_model(name, **settings)
        return kept[key]

    monkeypatch.setattr(setup, "load_model", load)
    yield
    kept.clear()


def told(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.mark.model
def test_each_trains_the_real_model(loaded_once: None, tmp_path: Path, made_model: Any) -> None:
    starts = {}
    for path in RECIPES:
        recipe = short(path, tmp_path / path.stem)
        if path.stem == "bitfit":  # the real model has no biases
            biased = made_model(tmp_path / "biased", attention_bias=True)
            recipe = recipe.model_copy(update={"model": str(biased)})
        outcome, job = train_recipe(recipe)
        assert job is not None
        seen = [event["loss"] for event in told(tmp_path / path.stem, "step")]
        assert len(seen) == 2 and all(torch.tensor(seen).isfinite()), path.stem
        assert outcome.trained_parameters > 0 and Path(outcome.adapter).is_dir(), path.stem
        restarts = told(tmp_path / path.stem, "restart")
        assert len(restarts) == (1 if path.stem in ("relora", "remora") else 0), path.stem
        starts[path.stem] = seen[0]
        job.adapter.detach()
    plain = starts["lora"]
    for name in ("lora_plus", "dora", "mora_sharing", "relora", "adalora", "pissa", "eva", "bottleneck", "full"):
        assert starts[name] == pytest.approx(plain, abs=1e-3), f"{name} changes the model before it has learned"
    assert starts["mora"] == pytest.approx(starts["qlora"], abs=0.1)
    assert starts["remora"] == pytest.approx(starts["mora"], abs=1e-3)
    assert abs(starts["prefix"] - plain) > 1e-3
