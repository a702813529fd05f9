"""Full fine-tuning as a delta: any weight is reachable, and folding gives that weight."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.methods.layers import delta_on, folded, layer_of, linear, moved, rows, through
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import TargetError
from veneer.methods.full import Full, FullConfig

CONFIG = FullConfig()


@pytest.mark.parametrize("bias", [True, False])
def test_any_layer_can_become_any_other(bias: bool) -> None:
    module, other, x = linear(5, 7, bias=bias), linear(5, 7, bias=bias, seed=9), rows(2, 3, 5)
    delta = delta_on(module, CONFIG)
    assert torch.equal(through(module, delta, x), module(x))
    delta.w.data.copy_(other.weight - module.weight)
    if bias:
        delta.db.data.copy_(other.bias - module.bias)
    assert torch.allclose(through(module, delta, x), other(x), atol=1e-6)
    assert torch.allclose(folded(module, delta, x), other(x), atol=1e-6)
    assert sum(p.numel() for p in delta.parameters()) == Full.n_params(layer_of(module), CONFIG) == 35 + 7 * bias


def test_one_step_is_one_step_of_the_layer_itself() -> None:
    module, x = linear(5, 3), rows(4, 5)
    own = linear(5, 3).requires_grad_(True)
    delta = delta_on(module, CONFIG)
    own(x).square().sum().backward()
    through(module, delta, x).square().sum().backward()
    assert torch.allclose(delta.w.grad, own.weight.grad, atol=1e-6)
    assert torch.allclose(delta.db.grad, own.bias.grad, atol=1e-6)


def test_embedding() -> None:
    table, tokens = nn.Embedding(9, 4, padding_idx=0).requires_grad_(False), torch.tensor([[1, 8], [0, 3]])
    delta = moved(delta_on(table, CONFIG))
    assert torch.allclose(through(table, delta, tokens), delta.fold(table.weight.T).T[tokens], atol=1e-6)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = nn.Sequential(linear(5, 6), linear(6, 5, bias=False)), rows(3, 5)
    adapter = attach(model, CONFIG)
    for delta in adapter.deltas.values():
        moved(delta)
    want = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    load_adapter(model, tmp_path / "a")
    assert torch.equal(model(x), want)


def test_a_convolution_is_refused() -> None:
    with pytest.raises(TargetError, match="method full changes layers of kind embedding, linear only"):
        attach(nn.Sequential(nn.Conv1d(2, 2, 1)), CONFIG, ("0",))
