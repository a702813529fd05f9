"""The base on the meta device has the sizes of the loaded one, and its first blocks are those of a shorter model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.base.meta import Untraceable, meta_base, shortened, traceable
from veneer.base.storage_config import base_storage
from veneer.errors import ConfigError
from veneer.models import skeleton
from veneer.storage.layers import Stored

MadeModel = Callable[..., Path]


def tensors(base: Base) -> dict[str, tuple[torch.Size, torch.dtype]]:
    network = base.network
    return {n: (t.shape, t.dtype) for n, t in [*network.named_parameters(), *network.named_buffers()]}


def nbytes(network: nn.Module) -> int:
    """An independent count: every distinct storage once."""
    seen: dict[int, int] = {}
    for t in [*network.parameters(), *network.buffers()]:
        seen[t.untyped_storage()._cdata] = t.numel() * t.element_size()
    return sum(seen.values())


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("storage", ["dense", "nf4", "fp4", "int8"])
def test_bytes_are_those_of_the_loaded_model(storage: str, tiny_model: Path) -> None:
    loaded = load_model(tiny_model, storage=storage, dtype="float32").network
    meta = meta_base(tiny_model, torch.float32, base_storage(storage))
    assert all(t.is_meta and not t.requires_grad for t in [*meta.network.parameters(), *meta.network.buffers()])
    assert not meta.network.training and meta.storage == base_storage(storage)
    tables = 14 * 1088 if storage in ("nf4", "fp4") else 0  # loaded weights share one pair of them
    assert nbytes(loaded) <= nbytes(meta.network) <= nbytes(loaded) + tables


def test_layers_of_one_shape_share_no_bytes(tiny_model: Path) -> None:
    meta = meta_base(tiny_model, torch.float32, base_storage("nf4"))
    codes = [m.storage.codes for m in meta.network.modules() if isinstance(m, Stored)]
    assert len(codes) == len({c.untyped_storage()._cdata for c in codes}) == 14


def test_a_quantized_folder_keeps_its_own_storage(tiny_model: Path, tmp_path: Path) -> None:
    load_model(tiny_model, storage="nf4", dtype="float32")
    (folder,) = (tmp_path / "cache" / "quantized").iterdir()
    meta = meta_base(folder, torch.float32)
    assert meta.storage is not None and meta.storage.config.storage == "nf4"
    assert tensors(meta) == tensors(meta_base(tiny_model, torch.float32, meta.storage))


def test_dense_files_whose_config_says_quantized(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "said"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert meta_base(folder, torch.float32).storage is None


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_shortened_is_the_model_built_with_that_many_blocks(
    storage: str, count: int, made_model: MadeModel, tmp_path: Path
) -> None:
    deep = made_model(tmp_path / "deep", num_hidden_layers=4)
    meta = meta_base(deep, torch.float32, base_storage(storage))
    before = tensors(meta)
    short, built = shortened(meta, count), meta_base(deep, torch.float32, base_storage(storage), blocks=count)
    assert tensors(short) == tensors(built) and nbytes(short.network) == nbytes(built.network)
    assert len(short.blocks) == count == short.network.config.num_hidden_layers
    assert [m.layer_idx for m in short.network.modules() if hasattr(m, "layer_idx")] == list(range(count))
    configs = {id(m.config) for m in short.network.modules() if hasattr(m, "config")}
    assert len(configs) == 1 and id(meta.network.config) not in configs
    assert short.network.get_input_embeddings().weight is short.network.get_output_embeddings().weight  # tied
    assert tensors(meta) == before and len(meta.blocks) == 4 == meta.network.config.num_hidden_layers
    assert nbytes(short.network) + nbytes(meta.network) == nbytes(nn.ModuleList([short.network, meta.network]))


def test_nothing_is_built_to_shorten_one_list_of_blocks(tiny_model: Path, monkeypatch: Any) -> None:
    meta, built = meta_base(tiny_model, torch.float32), []
    real = skeleton.build_skeleton
    monkeypatch.setattr("veneer.base.meta.build_skeleton", lambda *a, **k: built.append(k) or real(*a, **k))
    shortened(meta, 1)
    assert built == []
    layers = meta.network.model.layers
    meta.network.model.layers = nn.ModuleList([nn.ModuleList([block]) for block in layers])  # a list of lists
    apart = replace(meta)
    assert list(apart.blocks) == ["model.layers.0.0", "model.layers.1.0"]
    assert list(shortened(apart, 1).blocks) == ["model.layers.0"] and built == [{"blocks": 1}]


def test_kinds_of_layers_follow(made_model: MadeModel, tmp_path: Path) -> None:
    folder = made_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention"]
    shape = {**config, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "layer_types": kinds}
    (folder / "config.json").write_text(json.dumps(shape))
    meta = meta_base(folder, torch.float32)
    assert shortened(meta, 1).network.config.layer_types == kinds[:1]
    assert shortened(meta, 4).network.config.layer_types == [*kinds, kinds[1], kinds[1]]


def test_code_that_needs_values_is_untraceable_and_our_own_errors_pass() -> None:
    said = r"^m: a step cannot be traced .*estimated \(RuntimeError: needs values\)$"
    with pytest.raises(Untraceable, match=said), traceable("m"):
        raise RuntimeError("needs values\nand more")
    with pytest.raises(ConfigError, match="ours"), traceable("m"):
        raise ConfigError("ours")
