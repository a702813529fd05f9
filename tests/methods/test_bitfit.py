"""BitFit: only biases change, in the forward pass and when folded."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from tests.methods.layers import delta_on, folded, layer_of, linear, moved, rows, through
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import ConfigError, TargetError
from veneer.methods.bitfit import BitFit, BitFitConfig

CONFIG = BitFitConfig()


def test_only_the_bias_changes() -> None:
    module, x = linear(5, 7), rows(2, 3, 5)
    delta = moved(delta_on(module, CONFIG))
    want = x @ module.weight.T + (module.bias + delta.c)
    assert torch.allclose(through(module, delta, x), want, atol=1e-6)
    assert torch.allclose(folded(module, delta, x), want, atol=1e-6)
    assert torch.equal(delta.fold(module.weight), module.weight)
    assert sum(p.numel() for p in delta.parameters()) == BitFit.n_params(layer_of(module), CONFIG) == 7


def test_convolutions_and_norms_have_biases_too() -> None:
    conv, x = nn.Conv1d(3, 4, 2).requires_grad_(False), rows(2, 3, 6)
    delta = moved(delta_on(conv, CONFIG))
    want = nn.functional.conv1d(x, conv.weight, delta.fold_bias(conv.bias))
    assert torch.allclose(through(conv, delta, x), want, atol=1e-6)
    norm, x = nn.LayerNorm(6).requires_grad_(False), rows(2, 6)
    delta = moved(delta_on(norm, CONFIG))
    want = nn.functional.layer_norm(x, (6,), norm.weight, delta.fold_bias(norm.bias))
    assert torch.allclose(through(norm, delta, x), want, atol=1e-6)


def test_saved_and_loaded_and_refused_by_peft(tmp_path: Path) -> None:
    model, x = nn.Sequential(linear(5, 5), nn.LayerNorm(5)), rows(3, 5)
    adapter = attach(model, CONFIG, ("0", "1"))
    for delta in adapter.deltas.values():
        moved(delta)
    want = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    load_adapter(model, tmp_path / "a")
    assert torch.equal(model(x), want)
    with pytest.raises((KeyError, ValueError), match="BITFIT"):
        peft.PeftModel.from_pretrained(nn.Sequential(linear(5, 5)), str(tmp_path / "a"))


def test_layers_without_a_bias_are_refused_by_name_before_anything_changes() -> None:
    model = nn.Sequential(linear(5, 5, bias=False), linear(5, 5), linear(5, 5, bias=False))
    with pytest.raises(
        ConfigError, match=r"bitfit does not fit 2 of its 3 targets:\n  0: this layer has no bias.*\n  2: "
    ):
        attach(model, CONFIG)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(TargetError, match="0 is a layer of kind embedding"):
        attach(nn.Sequential(nn.Embedding(3, 3)), CONFIG, ("0",))
