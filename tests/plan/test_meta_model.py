"""The model without weights has the sizes of the one with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.adapters.attach import attach
from veneer.base.load import load_model
from veneer.base.storage_config import base_storage
from veneer.methods.base import config_from
from veneer.models.blocks import blocks_of
from veneer.plan.meta_model import Plain, base_bytes, tensor_bytes
from veneer.recipe.settings import Recipe
from veneer.storage.layers import Stored

Make = Callable[..., Recipe]


@pytest.mark.parametrize("storage", ["dense", "nf4", "fp4", "int8"])
def test_bytes_of_the_base_are_those_of_the_loaded_model(
    storage: str, recipe: Make, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    wanted = recipe(**{"storage.name": storage})
    loaded = load_model(wanted.model, storage=base_storage(wanted.storage.model_dump()), dtype="float32").network
    model = Plain.of(wanted).model()
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    tables = 14 * 1088 if storage in ("nf4", "fp4") else 0  # loaded weights share one pair of them
    assert tensor_bytes(loaded) <= tensor_bytes(model) <= tensor_bytes(loaded) + tables
    found = base_bytes(model)
    assert found["blocks"] + found["rest"] == tensor_bytes(model)
    assert found["largest block"] * 2 == found["blocks"]


@pytest.mark.parametrize("method", ["lora", "dora", "mora", "adalora", "ia3", "full"])
def test_trained_numbers_of_every_method(method: str, recipe: Make) -> None:
    wanted = recipe(method={"name": method} | ({"rank": 2} if method == "mora" else {}))
    plain = Plain.of(wanted)
    model = plain.model()
    loaded = load_model(wanted.model, storage=None, dtype="float32").network
    assert sum(plain.trained(model)) == attach(loaded, config_from(method, wanted.method.own)).n_params()
    assert plain.change(plain.model(1)).n_params() * 2 == sum(plain.trained(model))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_trained_numbers_of_prompts(kind: str, recipe: Make) -> None:
    alone = Plain.of(recipe(prompt={"name": kind, "tokens": 3}, method={"name": "none"}))
    beside = Plain.of(recipe(prompt={"name": kind, "tokens": 3}, method={"name": "lora", "rank": 2}))
    lora = Plain.of(recipe(method={"name": "lora", "rank": 2}))
    model = lora.model()
    assert sum(alone.trained(model)) == alone.change(alone.model()).n_params()
    assert sum(beside.trained(model)) == sum(alone.trained(model)) + sum(lora.trained(model))


def test_a_shortened_model_has_its_first_blocks(recipe: Make) -> None:
    plain = Plain.of(recipe())
    assert [len(blocks_of(plain.model(n))) for n in (1, 2, 3)] == [1, 2, 3]


def test_layers_of_one_shape_share_no_bytes(recipe: Make) -> None:
    model = Plain.of(recipe(**{"storage.name": "nf4"})).model()
    codes = [m.storage.codes for m in model.modules() if isinstance(m, Stored)]
    assert len(codes) == len({c.untyped_storage()._cdata for c in codes}) == 14


def test_files_that_are_not_quantized_as_their_config_says(recipe: Make, tmp_path: Path) -> None:
    base = recipe().model
    folder = tmp_path / "said"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    said = Plain.of(recipe(model=str(folder)))
    assert said.storage is None
    assert tensor_bytes(said.model()) == tensor_bytes(Plain.of(recipe()).model())
