"""Bottleneck adapters: after a layer, beside a block, and not to be folded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.methods.layers import (
    delta_on,
    gradients_hold,
    layer_of,
    learns_in_two_steps,
    linear,
    moved,
    rows,
    through,
)
from tests.methods.parity import fresh, logits
from tests.oracles import bottleneck as oracle
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import ConfigError, NotFoldable, TargetError
from veneer.methods.bottleneck import Bottleneck, BottleneckConfig

PARALLEL = BottleneckConfig(variant="parallel", size=3, scale=4.0)


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({"variant": "houlsby"}, "gelu"),
        ({"variant": "pfeiffer"}, "relu"),
        ({"variant": "parallel", "scale": 4.0}, "relu"),
        ({"variant": "pfeiffer", "activation": "silu"}, "silu"),
        ({"variant": "houlsby", "activation": "tanh"}, "tanh"),
    ],
)
def test_the_papers_network_after_or_beside(settings: dict[str, Any], activation: str) -> None:
    module, x = linear(6, 9), rows(4, 6)
    config = BottleneckConfig(size=3, **settings)
    delta = moved(delta_on(module, config))
    y = module(x)
    parts = [p.detach().numpy().astype(float) for p in (delta.down, delta.down_bias, delta.up, delta.up_bias)]
    fed = x if config.variant == "parallel" else y
    want = [oracle.change(h, *parts, activation, config.scale) for h in fed.numpy().astype(float)]
    assert np.abs((through(module, delta, x) - y).detach().numpy() - np.array(want)).max() < 1e-5
    assert sum(p.numel() for p in delta.parameters()) == Bottleneck.n_params(layer_of(module), config)


@pytest.mark.parametrize("config", [BottleneckConfig(size=3), PARALLEL])
def test_gradients(config: BottleneckConfig) -> None:
    module = linear(5, 4)
    config = BottleneckConfig(variant=config.variant, size=3, activation="tanh")
    assert gradients_hold(lambda: (module, moved(delta_on(module, config))), rows(2, 5))


def test_a_new_delta_changes_nothing_and_learns_in_two_steps() -> None:
    module, x = linear(6, 9), rows(8, 6)
    delta = delta_on(module, BottleneckConfig(size=3))
    assert torch.equal(through(module, delta, x), module(x))
    assert learns_in_two_steps(module, delta, x)


@pytest.mark.parametrize(
    ("config", "targets", "count"),
    [
        (BottleneckConfig(variant="houlsby", size=4), ("o_proj", "down_proj"), 4),
        (BottleneckConfig(variant="pfeiffer", size=4), ("down_proj",), 2),
        (BottleneckConfig(variant="parallel", size=4, scale=4.0), ("mlp",), 2),
    ],
)
def test_on_a_model_saved_and_loaded(
    tiny_model: Path, tmp_path: Path, config: BottleneckConfig, targets: tuple[str, ...], count: int
) -> None:
    model = fresh(tiny_model)
    plain = logits(model)
    adapter = attach(model, config, targets).eval()
    assert len(adapter.deltas) == count
    assert torch.equal(logits(model), plain)
    for delta in adapter.deltas.values():
        moved(delta, 0.2)
    want = logits(model)
    assert float((want - plain).abs().max()) > 0.1
    adapter.save(tmp_path / "a")
    adapter.detach()
    assert torch.equal(logits(model), plain)
    load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), want)


def test_beside_a_block_it_sees_what_the_block_is_fed(tiny_model: Path) -> None:
    model, seen = fresh(tiny_model), {}
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], y=out))
    adapter = attach(model, PARALLEL, ("layers.0.mlp",))
    delta = moved(adapter.deltas["model.layers.0.mlp"])
    assert (delta.down.shape, delta.up.shape) == ((3, 32), (32, 3))
    block.register_forward_hook(lambda _m, _args, out: seen.update(changed=out))
    logits(model)
    assert torch.equal(seen["changed"], delta(seen["x"], seen["y"]))


def test_it_refuses_to_be_folded_by_name() -> None:
    delta = delta_on(linear(6, 9), BottleneckConfig())
    with pytest.raises(NotFoldable, match="Bottleneck is not a change of one weight, so it cannot be folded"):
        delta.fold(torch.zeros(9, 6))


def test_bad_input(tiny_model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        BottleneckConfig(variant="before", size=0, activation="sine", dropout=1.0)  # type: ignore[arg-type]
    assert str(caught.value).splitlines() == [
        "bottleneck.variant must be one of houlsby, pfeiffer, parallel, got 'before'",
        "bottleneck.activation must be one of relu, gelu, silu, tanh, got 'sine'",
        "bottleneck.size must be at least 1, got 0",
        "bottleneck.dropout must be in [0, 1), got 1.0",
    ]
    with pytest.raises(TargetError, match="changes layers of kind linear, module only"):
        attach(nn.Sequential(nn.Embedding(3, 3)), BottleneckConfig(), ("0",))
    model = fresh(tiny_model)
    attach(model, BottleneckConfig(), ("self_attn",))
    with pytest.raises(TargetError, match="a target returned a tuple"):
        logits(model)


def test_blocks_are_layers_for_this_method_only(tiny_model: Path) -> None:
    from veneer.methods.lora import LoRAConfig

    with pytest.raises(TargetError, match="'mlp' matches"):
        attach(fresh(tiny_model), LoRAConfig(), ("mlp",))
