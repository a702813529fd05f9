"""Paged weights: the same numbers as mapped ones, whatever looks at them; what cannot be paged is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.told import Told
from veneer.base import fingerprint
from veneer.base.fingerprint import base_fingerprint
from veneer.base.load import load_model
from veneer.base.storage_config import base_storage, storage_of
from veneer.base.weight_paging import page_weights_
from veneer.disk.tensors import open_tensors
from veneer.errors import ConfigError, ModelError
from veneer.storage.layers import StoredLinear

STORAGES: list[Any] = ["nf4", "fp4", "int8", {"name": "nf4", "double_quant": False, "block": 32, "head": True}]
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base(made_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 blocks whose codes and absmax are larger than what stays in memory."""
    folder = tmp_path_factory.mktemp("paged") / "base"
    return made_model(folder, tied=False, num_hidden_layers=7, hidden_size=128, intermediate_size=320)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def loaded(base: Path, storage: Any, paged: bool) -> Any:
    return load_model(base, storage=base_storage(storage), dtype="float32", paged=paged).network


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_logits_dense_weights_and_fingerprint_are_those_of_mapped_weights(base: Path, storage: Any) -> None:
    plain, paged = loaded(base, storage, False), loaded(base, storage, True)
    with torch.no_grad():
        assert all(torch.equal(plain(IDS).logits, paged(IDS).logits) for _ in range(2))
    assert base_fingerprint(paged) == base_fingerprint(plain) and storage_of(paged) == storage_of(plain)
    state = paged.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    layers = [(n, m) for n, m in plain.named_modules() if isinstance(m, StoredLinear)]
    for name, module in reversed(layers):
        other = paged.get_submodule(name)
        assert torch.equal(module.dense(torch.float32), other.dense(torch.float32))
        assert torch.equal(module.storage.rows(IDS, torch.float32), other.storage.rows(IDS, torch.float32))


def test_the_fingerprint_asks_for_the_pages_of_paged_codes_and_of_no_others(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory, or will be read whole by the first step, is read as it comes."""
    plain, paged = loaded(base, "nf4", False), loaded(base, "nf4", True)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(fingerprint, "ask_for", lambda tensor, step: asked.append((tensor.numel(), step)))
    base_fingerprint(plain)
    assert asked == []
    base_fingerprint(paged)
    sizes = [m.storage.codes.numel() for m in paged.modules() if isinstance(m, StoredLinear)]
    assert asked == [(size, -(-size // fingerprint.SAMPLES)) for size in sizes] and len(sizes) == 49


def test_weights_are_in_few_buffers(base: Path) -> None:
    model = loaded(base, "nf4", True)
    layers = [m for _, m in model.named_modules() if isinstance(m, StoredLinear)]
    buffers = [layer.storage.codes.untyped_storage().data_ptr() for layer in layers]
    assert len(layers) == 7 * 7 and len(set(buffers)) == 3
    assert buffers[0] == buffers[21] == buffers[48]  # blocks 0, 3 and 6


def test_the_first_start_quantizes_into_the_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loaded(base, "nf4", False)(IDS).logits
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    told = Told()
    first = load_model(base, storage=base_storage("nf4"), dtype="float32", paged=True, say=told.append)
    assert any(line.startswith("quantizing") for line in told)
    assert torch.equal(first.network(IDS).logits, plain)
    assert first.folder == base and first.name == str(base)
    assert [p.name for p in (tmp_path / "quantized").iterdir() if p.name.startswith(".")] == []
    again = load_model(base, storage=base_storage("nf4"), dtype="float32", paged=True, say=told.append)
    assert torch.equal(again.network(IDS).logits, plain) and len(told) == 1


def test_a_gradient_without_recomputing_fails_instead_of_being_wrong(base: Path) -> None:
    model = loaded(base, "nf4", True)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(inputs_embeds=embedded).logits.sum().backward()


def test_paged_weights_cannot_be_changed(base: Path) -> None:
    model = loaded(base, "nf4", True)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    with pytest.raises(ConfigError, match="paged weights cannot be changed"):
        layer.storage.put_(torch.zeros(320, 128))
    state = {"weight": torch.zeros(1)}
    with pytest.raises(RuntimeError):
        layer.load_state_dict(state)


def test_what_cannot_be_paged_is_refused(base: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"is dense; set storage to nf4, fp4 or int8"):
        loaded(base, "dense", True)
    with pytest.raises(ConfigError, match="reads weights for a CPU, not for cuda"):
        load_model(base, storage="nf4", paged=True, device=torch.device("cuda"))
    plain = loaded(base, "nf4", False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no blocks whose weights .* memory.page_weights"):
        page_weights_(plain, open_tensors(base), {})
