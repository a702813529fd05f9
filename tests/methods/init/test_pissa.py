"""PiSSA against its paper's form with a changed base, and against peft's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.methods.layers import delta_on, folded, gradients_hold, layer_of, linear, moved, rows, through
from tests.methods.parity import drift_there, fresh, logits
from tests.oracles import pissa as oracle
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import AdapterMismatch, ConfigError
from veneer.methods.lora import LoRA, LoRAConfig


def pissa(iterations: int = 0, **own: Any) -> LoRAConfig:
    return LoRAConfig(init={"name": "pissa", "iterations": iterations}, **own)


CONFIG = pissa(rank=3, alpha=6)


@pytest.mark.parametrize(("d", "o"), [(9, 6), (6, 9)])
@pytest.mark.parametrize("iterations", [0, 8])
def test_the_trained_weight_is_the_papers(d: int, o: int, iterations: int) -> None:
    module, x = linear(d, o), rows(2, 3, d)
    delta = moved(delta_on(module, pissa(rank=3, alpha=6, iterations=iterations)))
    w, a, b = (t.detach().numpy().astype(float) for t in (module.weight, delta.a, delta.b))
    want = oracle.weight(w, a, b, 2.0)
    assert np.abs(delta.fold(module.weight).detach().numpy() - want).max() < 1e-5
    out = x.numpy() @ want.T + module.bias.numpy()
    assert np.abs(through(module, delta, x).detach().numpy() - out).max() < 1e-4
    assert torch.allclose(folded(module, delta, x), through(module, delta, x), atol=1e-5)
    assert sum(p.numel() for p in delta.parameters()) == LoRA.n_params(layer_of(module), CONFIG) == 3 * 15


def test_the_first_values_are_the_principal_ones_shared_evenly() -> None:
    module = linear(9, 6)
    delta = delta_on(module, CONFIG)
    values = torch.linalg.svdvals(module.weight)[:3] / 2
    assert torch.allclose(delta.a @ delta.a.T, torch.diag(values), atol=1e-5)
    assert torch.allclose(delta.b.T @ delta.b, torch.diag(values), atol=1e-5)


def test_gradients_reach_both_factors_at_once() -> None:
    module = linear(5, 4)
    config = pissa(rank=2, alpha=4)
    assert gradients_hold(lambda: (module, moved(delta_on(module, config))), rows(2, 5))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_new_delta_changes_nothing_and_a_restart_makes_it_new(dropout: float) -> None:
    module, x = linear(9, 6), rows(4, 9)
    delta = delta_on(module, pissa(rank=3, dropout=dropout))
    assert torch.equal(through(module, delta, x), module(x))
    moved(delta).eval()
    want = through(module, delta, x)
    module.weight.data.copy_(delta.fold(module.weight))
    delta.restart_(torch.Generator())
    assert torch.allclose(through(module, delta, x), want, atol=1e-5)
    assert torch.equal(delta.train().fold(module.weight), module.weight)


TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank_stabilized": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3.0}}],
    ids=str,
)
def test_peft_reads_ours_as_plain_lora(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert drift_there(tiny_model, pissa(rank=4, alpha=8, **settings), TARGETS, tmp_path / "a") < 1e-4
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (fields["r"], fields["init_lora_weights"]) == (8, True)


def test_it_starts_where_pefts_does(tiny_model: Path) -> None:
    """The same A and B, up to the sign of each singular vector, which the product does not show."""
    model = fresh(tiny_model)
    adapter = attach(model, pissa(rank=4, alpha=8), TARGETS)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=list(TARGETS))
    theirs: Any = peft.tuners.lora.LoraModel(fresh(tiny_model), config, "default")
    for path, delta in adapter.deltas.items():
        layer = theirs.model.get_submodule(path)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.allclose(delta.b @ delta.a, product, atol=1e-5)
        assert torch.allclose(delta.a.abs(), layer.lora_A["default"].weight.abs(), atol=1e-4)


def test_saved_and_read_as_lora_of_twice_the_rank(tiny_model: Path, tmp_path: Path) -> None:
    model = fresh(tiny_model)
    adapter = attach(model, pissa(rank=4, alpha=8), TARGETS)
    for delta in adapter.deltas.values():
        moved(delta, 0.2)
    want = logits(model)
    adapter.save(tmp_path / "a")
    adapter.detach()
    again = load_adapter(model, tmp_path / "a")
    assert again.settings == LoRAConfig(rank=8, alpha=16)
    assert float((logits(model) - want).abs().max()) < 1e-4


def test_its_own_training_goes_on_exactly() -> None:
    module = linear(9, 6)
    delta, other = moved(delta_on(module, CONFIG)), delta_on(module, CONFIG)
    other.load_({k: t.clone() for k, t in delta.tensors().items()})
    assert all(torch.equal(getattr(delta, n), getattr(other, n)) for n in ("a", "b", "a0", "b0"))
    with pytest.raises(AdapterMismatch, match=r"lora_A\.weight: adapter has \(3, 9\), model needs \(6, 9\)"):
        other.load_({"lora_A.weight": delta.a, "lora_B.weight": delta.b})


def test_a_checkpoint_keeps_the_first_values() -> None:
    module = linear(9, 6)
    delta, other = moved(delta_on(module, CONFIG)), delta_on(linear(9, 6, seed=8), CONFIG)
    other.load_state_dict(delta.state_dict())
    assert torch.equal(other.fold(module.weight), delta.fold(module.weight))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"^lora.init: pissa.iterations must be at least 0, got -1$"):
        pissa(iterations=-1)
    with pytest.raises(ConfigError, match=r"0: lora.rank 8 is above 6, the most singular values this layer has"):
        attach(nn.Sequential(linear(9, 6)), pissa(rank=8))
    with pytest.raises(ConfigError, match=r"lora.init pissa starts on layers of kind linear only"):
        attach(nn.Sequential(nn.Embedding(4, 4)), CONFIG, ("0",))
