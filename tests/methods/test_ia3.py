"""(IA)^3 against its paper's equations and peft."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.methods.layers import delta_on, folded, gradients_hold, layer_of, linear, moved, rows, through
from tests.methods.parity import drift_here, drift_there
from tests.oracles import ia3 as oracle
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import ConfigError, TargetError
from veneer.methods.ia3 import IA3, IA3Config

OUTPUT, INPUT = IA3Config(feedforward=""), IA3Config(feedforward=".*")
CONFIGS = [OUTPUT, INPUT]


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_and_fold_are_the_papers_product(config: IA3Config) -> None:
    module, x = linear(7, 5), rows(4, 7)
    delta = moved(delta_on(module, config))
    w, b, factor = (t.detach().numpy().astype(float) for t in (module.weight, module.bias, delta.factor))
    want = oracle.outputs(x.numpy().astype(float), w, b, factor, config is INPUT)
    assert np.abs(through(module, delta, x).detach().numpy() - want).max() < 1e-5
    assert np.abs(folded(module, delta, x).detach().numpy() - want).max() < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients(config: IA3Config) -> None:
    module = linear(5, 4)
    assert gradients_hold(lambda: (module, moved(delta_on(module, config))), rows(2, 5))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_new_delta_changes_nothing(config: IA3Config) -> None:
    module, x = linear(7, 5), rows(4, 7)
    delta = delta_on(module, config)
    assert torch.equal(through(module, delta, x), module(x))
    assert sum(p.numel() for p in delta.parameters()) == IA3.n_params(layer_of(module), config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_fold_as_they_run(config: IA3Config, groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups).requires_grad_(False)
    delta, x = moved(delta_on(conv, config)), rows(2, 4, 5, 5)
    bias = delta.fold_bias(layer_of(conv).bias())  # type: ignore[misc]
    want = nn.functional.conv2d(x, delta.fold(conv.weight), bias, padding=1, groups=groups)
    assert torch.allclose(through(conv, delta, x), want, atol=1e-5)


def test_the_feedforward_modules_are_found_by_their_paths() -> None:
    config = IA3Config()
    assert config.at("model.layers.3.mlp.down_proj").scales_input("")
    assert config.at("h.0.mlp.c_proj").scales_input("")
    assert not config.at("h.0.attn.c_proj").scales_input("")
    assert not config.at("model.layers.3.self_attn.k_proj").scales_input("")
    assert not config.at("model.layers.3.mlp.updown_proj").scales_input("")


TARGETS = ("k_proj", "v_proj", "down_proj")


@pytest.mark.parametrize("targets", [TARGETS, r".*\.(k_proj|down_proj)"])
def test_peft_reads_ours(tiny_model: Path, tmp_path: Path, targets: Any) -> None:
    assert drift_there(tiny_model, IA3Config(), targets, tmp_path / "a", spread=0.5) < 1e-4


@pytest.mark.parametrize("feedforward", [["down_proj"], r".*\.down_proj", []])
def test_we_read_pefts(tiny_model: Path, tmp_path: Path, feedforward: Any) -> None:
    config = peft.IA3Config(target_modules=list(TARGETS), feedforward_modules=feedforward)
    assert drift_here(tiny_model, config, tmp_path / "a", spread=0.5) < 1e-4


def test_attached_detached_saved_and_loaded_on_a_transposed_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Conv1D(6, 4), Conv1D(4, 6)).requires_grad_(False), rows(3, 4)
    plain = model(x)
    adapter = attach(model, IA3Config(feedforward=("1",)), ("0", "1"))
    for delta in adapter.deltas.values():
        moved(delta)
    want = model(x)
    adapter.save(tmp_path / "a")
    adapter.detach()
    assert torch.equal(model(x), plain)
    load_adapter(model, tmp_path / "a")
    assert torch.equal(model(x), want)
    assert not torch.equal(want, plain)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"ia3.feedforward '\(' is not a regular expression"):
        IA3Config(feedforward="(")
    with pytest.raises(TargetError, match="method ia3 changes layers of kind conv, linear only"):
        attach(nn.Sequential(nn.Embedding(4, 4)), IA3Config(), ("0",))
