"""DoRA against its paper's equations and peft."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.methods.layers import delta_on, folded, layer_of, linear, moved, rows, through
from tests.methods.parity import drift_here, drift_there
from tests.oracles import dora as oracle
from veneer.adapters.attach import attach
from veneer.errors import ConfigError
from veneer.methods.dora import DoRA, DoRAConfig

CONFIG = DoRAConfig(rank=3, alpha=6)


def arrays(module: nn.Module, delta: DoRA) -> dict[str, Any]:
    parts = {"w": layer_of(module).weight(), "a": delta.a, "b": delta.b, "m": delta.m}
    return {k: v.detach().numpy().astype(np.float64) for k, v in parts.items()} | {"scale": delta.scale}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d", "o"), [(12, 7), (7, 12)])
def test_forward_and_fold_are_the_papers_weight(d: int, o: int, bias: bool) -> None:
    module = linear(d, o, bias=bias)
    delta, x = moved(delta_on(module, CONFIG)), rows(2, 3, d)
    want = oracle.weight(**arrays(module, delta))
    assert np.abs(delta.fold(layer_of(module).weight()).detach().numpy() - want).max() < 1e-5
    out = x.numpy() @ want.T + (module.bias.numpy() if bias else 0)
    assert np.abs(through(module, delta, x).detach().numpy() - out).max() < 1e-5
    assert torch.allclose(folded(module, delta, x), through(module, delta, x), atol=1e-5)


def test_gradients_hold_the_norm_constant() -> None:
    module = linear(9, 6)
    delta, x, g = moved(delta_on(module, CONFIG)), rows(5, 9), rows(5, 6, seed=8)
    (through(module, delta, x) * g).sum().backward()
    wants = oracle.gradients(x.numpy().astype(float), g.numpy().astype(float), **arrays(module, delta))
    for parameter, want in zip((delta.a, delta.b, delta.m), wants, strict=True):
        assert np.abs(parameter.grad.numpy() - want).max() < 1e-4


def test_a_new_delta_changes_nothing_and_its_magnitude_is_the_weights() -> None:
    module = linear(9, 6)
    delta, x = delta_on(module, CONFIG), rows(4, 9)
    assert torch.equal(through(module, delta, x), module(x))
    assert torch.equal(delta.fold(module.weight), module.weight)
    assert torch.allclose(delta.m, module.weight.norm(dim=1))


def test_a_restart_takes_the_folded_weights_magnitude() -> None:
    module, x = linear(9, 6), rows(4, 9)
    delta = moved(delta_on(module, CONFIG))
    want = through(module, delta, x)
    module.weight.data.copy_(delta.fold(module.weight))
    delta.restart_(torch.Generator().manual_seed(5))
    assert torch.count_nonzero(delta.b) == 0
    assert torch.allclose(through(module, delta, x), want, atol=1e-5)


def test_convolution_and_embedding_fold_as_they_run() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2).requires_grad_(False)
    delta, x = moved(delta_on(conv, CONFIG)), rows(2, 4, 9, 9)
    want = nn.functional.conv2d(x, delta.fold(conv.weight), conv.bias, 2, 1, 2)
    assert torch.allclose(through(conv, delta, x), want, atol=1e-4)
    table = nn.Embedding(11, 6).requires_grad_(False)
    delta, tokens = moved(delta_on(table, CONFIG)), torch.tensor([[0, 3, 10]])
    want = nn.functional.embedding(tokens, delta.fold(table.weight.T).T)
    assert torch.allclose(through(table, delta, tokens), want, atol=1e-4)


def test_size() -> None:
    for module in (linear(9, 6), nn.Conv2d(4, 6, 3), nn.Embedding(11, 6)):
        module.requires_grad_(False)
        delta = delta_on(module, CONFIG)
        assert sum(p.numel() for p in delta.parameters()) == DoRA.n_params(layer_of(module), CONFIG)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("settings", [{}, {"rank_stabilized": True, "rank_pattern": {"v_proj": 2}}])
def test_peft_reads_ours(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    targets = ("q_proj", "v_proj", "down_proj")
    assert drift_there(tiny_model, DoRAConfig(rank=4, alpha=8, **settings), targets, tmp_path / "a") < 1e-4


@pytest.mark.parametrize("targets", [ALL, ["embed_tokens", "q_proj"]])
def test_we_read_pefts(tiny_untied: Path, tmp_path: Path, targets: list[str]) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets)
    assert drift_here(tiny_untied, config, tmp_path / "a") < 1e-4


def test_a_convolution_of_pefts(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(x)
            return out

    torch.manual_seed(0)
    net, x = Net(), rows(1, 3, 5, 5)
    adapter = attach(net, CONFIG, ("conv",))
    moved(adapter.deltas["conv"])
    want = net(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    assert torch.allclose(peft.PeftModel.from_pretrained(net, str(tmp_path / "a"))(x), want, atol=1e-4)


def test_bad_settings_are_named_after_the_method() -> None:
    with pytest.raises(ConfigError, match=r"dora.dropout must be in \[0, 1\), got 2"):
        DoRAConfig(dropout=2)
    assert DoRA.from_peft({"peft_type": "LORA", "r": 4}) is None
