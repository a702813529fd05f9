"""What a recipe's `storage` may say, and what an adapter folder says of its base."""

from pathlib import Path
from typing import Any

import pytest

from tests.golden.toys import llama
from veneer.adapters.attach import attach
from veneer.base.storage_config import BaseStorage, base_storage, storage_for, storage_of
from veneer.errors import ConfigError
from veneer.methods.base import config_from
from veneer.storage.layers import store_
from veneer.storage.nf4 import NF4Config


def test_a_name_and_its_settings() -> None:
    assert base_storage("dense") is None
    assert base_storage({}) is None
    assert base_storage("nf4") == BaseStorage(config=NF4Config())
    given = {"name": "nf4", "block": 128, "double_quant": False, "embeddings": True}
    made = base_storage(given)
    assert made == BaseStorage(config=NF4Config(block=128, double_quant=False), embeddings=True)
    assert made.settings == {**given, "head": False}
    assert base_storage(made.settings) == made
    assert str(made) == "nf4 (block 128, embeddings True)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nf5", r"there is no storage 'nf5'\. Did you mean 'nf4'"),
        (4, r"storage is 4, a name is needed: dense, fp4, int8, nf4"),
        (None, r"storage is None, a name is needed"),
        ({"name": ["nf4"]}, r"storage is \['nf4'\], a name is needed"),
        ({"name": "nf4", "blok": 64}, r"storage nf4 has no setting 'blok'\. Did you mean 'block'"),
        ({"name": "nf4", "block": 65}, r"nf4: block is 65, should be one of 32, 64"),
        ({"name": "nf4", "block": "many"}, r"nf4\.block is 'many': input should be a valid integer"),
        (
            {"name": "nf4", "head": 1, "embeddings": "x"},
            r"storage\.head is 1.*\nstorage\.embeddings is 'x', true or fal",
        ),
        ({"name": "dense", "head": True}, r"storage\.head is true, but dense keeps every weight as it is"),
        (
            {"name": "nf4", "backend": "cuda"},
            r"storage\.backend is 'cuda', should be one of auto, veneer, bitsandbytes",
        ),
        ({"name": "int8", "backend": "bitsandbytes"}, r"storage\.backend is bitsandbytes, but int8 has only one"),
        ({"name": "int8", "block": 64}, r"storage int8 has no setting 'block'"),
    ],
)
def test_what_is_wrong_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base_storage(given)


def saved_on(folder: Path, storage: str | dict[str, Any]) -> Path:
    model = llama()
    kept = base_storage(storage)
    if kept is not None:
        store_(model, kept.config, [p for p, m in model.named_modules() if p.endswith("_proj")])
    assert storage_of(model) == kept
    attach(model, config_from("lora", {"rank": 2}), ("q_proj",)).save(folder)
    return folder


def test_adapters_say_what_they_need(tmp_path: Path) -> None:
    wide = {"name": "nf4", "block": 128}
    nf4, dense = saved_on(tmp_path / "nf4", wide), saved_on(tmp_path / "dense", "dense")
    assert storage_for([], None) is None
    assert storage_for([], "nf4") == base_storage("nf4")
    assert storage_for([dense], None) is None
    assert storage_for([nf4], None) == base_storage(wide)
    assert storage_for([nf4], "nf4") == base_storage(wide), "the adapter's own settings"
    assert storage_for([nf4], "fp4") == base_storage("fp4")
    assert storage_for([nf4], "dense") is None
    with pytest.raises(ConfigError, match=rf"(?s)\(storage=NAME\):\n  {nf4}: nf4 \(block 128.*\n  {dense}: dense"):
        storage_for([nf4, dense], None)
    assert storage_for([nf4, dense], "dense") is None
