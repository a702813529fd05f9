"""Whole runs on a base kept in 4 bits: trained, measured, merged and spoken with on what it was trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.base.storage_config import base_storage, storage_of
from veneer.cli.main import invoke
from veneer.errors import ConfigError
from veneer.recipe.load import load_recipe, parse_flags
from veneer.recipe.settings import Recipe
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_a_run_on_nf4(job: Make, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = job(storage={"name": "nf4", "block": 128}, **{"train.steps": 20, "data.eval": str(rows), "data.rows": 6})
    told: list[str] = []
    outcome, done = train_recipe(recipe, [], told.append)
    assert done is not None
    assert storage_of(done.base.network) == base_storage({"name": "nf4", "block": 128})
    assert any(line.startswith("quantizing") for line in told)
    facts = json.loads((Path(outcome.adapter) / "veneer.json").read_text())
    assert facts["base"]["storage"]["block"] == 128 and facts["recipe"]["storage"]["block"] == 128
    losses = [json.loads(line)["loss"] for line in (Path(recipe.run) / "events.jsonl").read_text().splitlines()]
    assert losses[-2] < 0.8 * losses[0]

    assert invoke(["eval", recipe.run, "--metric", "loss", "--dtype", "float32", "--json"]) == 0
    assert said(capsys)["metrics"]["loss"] == pytest.approx(outcome.eval_loss, rel=1e-3)
    assert invoke(["eval", recipe.run, "--metric", "loss", "--storage", "dense"]) == 2
    assert "were kept as nf4 (block 128, double_quant True), those here are kept as dense" in capsys.readouterr().err
    dense = ["--storage", "dense", "--allow-other-base", "--no-before", "--dtype", "float32", "--json"]
    assert invoke(["eval", recipe.run, "--metric", "loss", *dense]) == 0
    assert said(capsys)["metrics"]["loss"] != pytest.approx(outcome.eval_loss, rel=1e-4)

    merged = tmp_path / "merged"
    with_adapter = [recipe.model, "--adapter", outcome.adapter]
    assert invoke(["merge", *with_adapter, "--into", str(merged), "--rows", "4", "--json"]) == 0
    assert said(capsys)["relative_drift"] < 1e-4
    more = ["--prompt", "the city", "--max-tokens", "6", "--dtype", "float32", "--json"]
    assert invoke(["generate", *with_adapter, *more]) == 0
    text = said(capsys)["text"]
    assert invoke(["generate", str(merged), *more]) == 0
    assert said(capsys)["text"] == text


def test_the_same_run_twice_is_the_same_adapter(job: Make) -> None:
    """The second time the weights are mapped from the cache."""
    bytes_ = []
    for name in ("one", "two"):
        recipe = job(name, storage={"name": "nf4"}, **{"train.steps": 2})
        outcome, _ = train_recipe(recipe)
        bytes_.append((Path(outcome.adapter) / "adapter_model.safetensors").read_bytes())
    assert bytes_[0] == bytes_[1]


def test_bfloat16_compute(job: Make) -> None:
    recipe = job(storage={"name": "nf4"}, **{"train.steps": 2, "train.dtype": "bfloat16", "train.recompute": True})
    _, done = train_recipe(recipe)
    assert done is not None and done.base.network.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in done.adapter.parameters())


GOOD = "model: m\nrun: r\ndata: {train: t.jsonl}\n"


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ("storage: nf5\n", [], r"recipe\.yaml, line 4: there is no storage 'nf5'\. Did you mean 'nf4'"),
        ("storage:\n  name: nf4\n  blok: 64\n", [], r"recipe\.yaml, line 6: storage nf4 has no setting 'blok'"),
        ("storage:\n  name: nf4\n  block: 65\n", [], r"recipe\.yaml, line 6: nf4: block is 65, should be one of"),
        ("storage: {head: true}\n", [], r"line 4: storage\.head is true, but dense"),
        ("", ["--storage", "int8", "--storage.block", "64"], r"--storage\.block: storage int8 has no setting 'block'"),
        ("load_in_4bit: true\nstorage: int8\n", [], r"line 4: load_in_4bit is true, but storage\.name is 'int8'"),
    ],
)
def test_what_is_wrong_has_its_place(tmp_path: Path, lines: str, flags: list[str], message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD + lines)
    with pytest.raises(ConfigError, match=message):
        load_recipe(file, parse_flags(flags))


def test_recipes_name_a_storage_in_many_ways(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for lines in ("storage: nf4", "load_in_4bit: true", "storage: {name: nf4}", "bnb_4bit_quant_type: nf4"):
        file.write_text(f"{GOOD}{lines}\n")
        assert base_storage(load_recipe(file).storage.model_dump()) == base_storage("nf4")
    file.write_text(f"{GOOD}load_in_4bit: true\nbnb_4bit_quant_type: fp4\nbnb_4bit_use_double_quant: false\n")
    wanted = {"name": "fp4", "double_quant": False}
    assert base_storage(load_recipe(file).storage.model_dump()) == base_storage(wanted)
    assert base_storage(load_recipe(file, parse_flags(["--storage.block", "32"])).storage.model_dump()) == base_storage(
        {**wanted, "block": 32}
    )
