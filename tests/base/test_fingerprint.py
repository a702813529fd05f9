"""One base, one fingerprint: whatever dtype it was loaded in; another base, another."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden.toys import llama
from veneer.adapters.attach import attach
from veneer.base.fingerprint import SAMPLES, base_fingerprint, fingerprint
from veneer.base.storage_config import base_storage
from veneer.methods.lora import LoRAConfig
from veneer.storage.layers import store_


def test_it_is_what_its_description_says() -> None:
    """Recomputed with NumPy: bfloat16 is float32 rounded to its upper half, ties to even."""
    a, b = torch.arange(1000.0).reshape(10, 100) / 7, torch.tensor([1.0])
    digest = hashlib.sha256()
    for name, values in (("a", a.flatten()[::4]), ("b", b)):
        digest.update(f"{name} {(10, 100) if name == 'a' else (1,)} ".encode())
        bits = values.numpy().view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        digest.update(rounded.astype("<u2").tobytes())
    assert fingerprint([("b", b), ("a", a)]) == digest.hexdigest()


@pytest.mark.parametrize("numel", [1, 255, 256, 257, 511, 512, 1000])
def test_at_most_the_stated_number_of_values_is_read_and_they_reach_the_end(numel: int) -> None:
    step = -(-numel // SAMPLES)
    seen = []
    for i in range(numel):
        tensor = torch.zeros(numel)
        tensor[i] = 1
        if fingerprint([("a", tensor)]) != fingerprint([("a", torch.zeros(numel))]):
            seen.append(i)
    assert seen == list(range(0, numel, step))
    assert len(seen) <= SAMPLES
    assert seen[-1] >= numel - step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_bfloat16_values_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    model = llama().bfloat16().float()
    assert base_fingerprint(llama().bfloat16().to(dtype)) == base_fingerprint(model)


def test_names_shapes_and_values_count() -> None:
    base = fingerprint([("a", torch.ones(2, 3))])
    assert fingerprint([("b", torch.ones(2, 3))]) != base
    assert fingerprint([("a", torch.ones(3, 2))]) != base
    assert fingerprint([("a", torch.ones(2, 3) * 1.01)]) != base
    assert fingerprint([("a", torch.ones(2, 3))]) == base


def test_it_does_not_depend_on_memory_layout() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert fingerprint([("a", tensor.T)]) == fingerprint([("a", tensor.T.contiguous())])


def test_an_attached_adapter_and_training_it_change_nothing() -> None:
    model = llama()
    before = base_fingerprint(model)
    adapter = attach(model, LoRAConfig(rank=2, init="random"))
    assert base_fingerprint(model) == before
    with torch.no_grad():
        adapter.parameters()[0].add_(1)
    assert base_fingerprint(model) == before


def test_buffers_are_no_part_of_it() -> None:
    module = nn.Linear(2, 2)
    before = base_fingerprint(module)
    module.register_buffer("cache", torch.ones(3))
    assert base_fingerprint(module) == before


def test_a_quantized_base_is_told_by_its_codes_and_how_they_are_kept() -> None:
    def of(settings: str | dict[str, Any]) -> str:
        model = llama()
        kept = base_storage(settings)
        assert kept is not None
        store_(model, kept.config, [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"])
        return base_fingerprint(model)

    others = ["nf4", "fp4", "int8", {"name": "nf4", "block": 128}, {"name": "nf4", "double_quant": False}]
    assert len({base_fingerprint(llama()), *map(of, others)}) == 6
    assert of("nf4") == of("nf4")
    model = llama()
    store_(model, base_storage("nf4").config, ["model.layers.0.mlp.up_proj"])  # type: ignore[union-attr]
    before = base_fingerprint(model)
    model.get_submodule("model.layers.0.mlp.up_proj").storage.codes[0] += 1
    assert base_fingerprint(model) != before
