"""Adapters of other methods as LoRA: equal where that is possible, and the error told where it is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.methods.layers import linear, moved, rows
from tests.methods.parity import fresh, logits, peft_loads
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.errors import ConfigError, NotFoldable
from veneer.merge.export import as_lora
from veneer.methods.base import config_from

MODEL_SIZES = ((24, 16), (16, 24))


def model() -> nn.Module:
    return nn.Sequential(*(linear(d, o, seed=d) for d, o in MODEL_SIZES))


def trained(net: nn.Module, method: str, **settings: Any) -> Adapter:
    adapter = attach(net, config_from(method, settings)).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, seed=n)
    return adapter


EQUAL = [
    ("mora", {"rank": 2, "variant": "truncation"}),
    *(("mora", {"rank": 2, "variant": "sharing", "grouping": n}) for n in (1, 2, 3, 4)),
    ("lora", {"rank": 3, "alpha": 7.0, "rank_pattern": {"1": 2}}),
    ("adalora", {"rank": 4, "target_rank": 2}),
    ("lora", {"rank": 3, "init": "pissa"}),
]


@pytest.mark.parametrize(("method", "settings"), EQUAL, ids=str)
def test_equal_where_the_method_has_factors(method: str, settings: dict[str, Any]) -> None:
    net, x = model(), rows(5, 24)
    adapter = trained(net, method, **settings)
    want = net(x)
    made = as_lora(adapter)
    assert made.exact
    adapter.detach()
    made.adapter.attach()
    assert torch.allclose(net(x), want, atol=1e-4)
    ranks = {d.a.shape[0] for d in made.adapter.deltas.values()}
    assert ranks == {made.adapter.settings.rank}, "one rank for all layers"
    assert all(d.scale == 1.0 for d in made.adapter.deltas.values())


def test_sharing_has_the_rank_of_its_matrix() -> None:
    made = as_lora(trained(model(), "mora", rank=2, variant="sharing"))
    assert made.adapter.settings.rank == 9  # sqrt(2 * (24 + 16)) = 8.94


DENSE = [
    ("mora", {"rank": 2, "variant": "rotation"}),
    ("mora", {"rank": 2, "variant": "decoupling"}),
    ("dora", {"rank": 2}),
]


@pytest.mark.parametrize(("method", "settings"), DENSE, ids=str)
def test_the_nearest_of_a_rank_and_its_error(method: str, settings: dict[str, Any]) -> None:
    net = model()
    adapter = trained(net, method, **settings)
    with pytest.raises(
        ConfigError, match=rf"{method}: the update of 2 layers \(0, ...\) has no small rank.*give a rank"
    ):
        as_lora(adapter)
    made = as_lora(adapter, rank=4)
    for path, delta in adapter.deltas.items():
        w = net.get_submodule(path).weight
        update = (delta.fold(w) - w).detach().double().numpy()
        kept = (made.adapter.deltas[path].fold(w) - w).detach().double().numpy()
        values = np.linalg.svd(update, compute_uv=False)
        best = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())  # Eckart and Young
        assert best > 0.05
        assert np.linalg.norm(update - kept) / np.linalg.norm(update) == pytest.approx(best, abs=1e-4)
        assert made.errors[path] == pytest.approx(best, abs=1e-4)
    assert not made.exact


def test_full_rank_loses_nothing() -> None:
    net, x = model(), rows(5, 24)
    adapter = trained(net, "mora", rank=2, variant="rotation")
    want = net(x)
    made = as_lora(adapter, rank=20)
    assert max(made.errors.values()) < 1e-6
    adapter.detach()
    made.adapter.attach()
    assert torch.allclose(net(x), want, atol=1e-4)


def test_a_smaller_rank_than_the_factors_is_cut_with_its_error() -> None:
    made = as_lora(trained(model(), "mora", rank=2, variant="sharing"), rank=3)
    assert made.adapter.settings.rank == 3
    assert all(0.01 < e < 1 for e in made.errors.values())


def test_peft_loads_a_mora_adapter_as_lora(tiny_model: Path, tmp_path: Path) -> None:
    net = fresh(tiny_model)
    adapter = attach(net, config_from("mora", {"rank": 2, "variant": "sharing"})).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.1, seed=n)
    want = logits(net)
    as_lora(adapter).adapter.save(tmp_path / "lora")
    assert float((logits(peft_loads(tiny_model, tmp_path / "lora")) - want).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("bitfit", {}, "this bitfit adapter cannot be said in LoRA:\n  0: its bias is changed too\n  1: its bias"),
        ("ia3", {}, "0: its bias is changed too"),
        ("bottleneck", {}, "0: Bottleneck is not a change of one weight"),
    ],
)
def test_what_lora_cannot_say(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NotFoldable, match=message):
        as_lora(trained(model(), method, **settings), rank=2)


def test_embeddings_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(9, 6), linear(6, 6))
    adapter = attach(net, config_from("lora", {"rank": 2}), ("0", "1"))
    with pytest.raises(NotFoldable, match="  0 is a layer of kind embedding"):
        as_lora(adapter)
