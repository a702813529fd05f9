"""Weights that hold the past while a model trains, made from the base's each time, and put back bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.methods.layers import moved
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.adapters.restart_merge import Folding
from veneer.base.load import load_model
from veneer.errors import ConfigError
from veneer.methods.base import config_from
from veneer.storage.layers import store_
from veneer.storage.nf4 import NF4Config


class Net(nn.Module):
    """A linear layer and GPT-2's kind of one, whose weight is (D, O)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(12, 9), Conv1D(7, 9)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.other(self.one(x))
        return y


def cycle(adapter: Adapter, folding: Folding | None, seed: int, by: float = 0.3) -> None:
    """Learn something and restart."""
    rng = torch.Generator().manual_seed(seed)
    for delta in adapter.deltas.values():
        moved(delta, by).remember_()
    if folding is not None:
        folding.put_()
    for delta in adapter.deltas.values():
        delta.restart_(rng)


@pytest.mark.parametrize(("method", "init"), [("lora", "uniform"), ("dora", "uniform"), ("lora", "pissa")])
def test_in_the_weight_and_beside_it_the_past_means_the_same(method: str, init: str) -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    adapters = [
        attach(Net(), config_from(method, {"rank": 2, "init": init}), ("one", "other")).eval() for _ in range(2)
    ]
    folding = Folding(adapters[0], "weight")
    base = [p.detach().clone() for p in adapters[0].model.parameters()]
    for seed in range(3):
        cycle(adapters[0], folding, seed)
        cycle(adapters[1], None, seed)
        inside, beside = (a.model(x) for a in adapters)
        assert torch.allclose(inside, beside, atol=1e-5)
        assert torch.allclose(adapters[1].disabled().__enter__()(x), Net()(x))
        adapters[1].attach()
    folding.restore_()
    assert all(torch.equal(a, b) for a, b in zip(base, adapters[0].model.parameters(), strict=True))
    assert torch.allclose(adapters[0].model(x), inside, atol=1e-5)


def test_rounding_is_measured_and_each_time_from_the_base() -> None:
    """The stored weight is the exact one rounded once: nothing of earlier roundings is in it."""
    adapter = attach(Net(torch.bfloat16), config_from("lora", {"rank": 2}), ("one", "other"))
    base = {path: adapter.model.get_submodule(path).weight.detach().clone() for path in ("one", "other")}
    folding = Folding(adapter, "auto")
    for seed in range(4):
        cycle(adapter, None, seed, 0.05)
        rounding = folding.put_()
    lost = whole = change = 0.0
    for path, delta in adapter.deltas.items():
        stored = adapter.model.get_submodule(path).weight.detach()
        w, stored = (t.T.double() if path == "other" else t.double() for t in (base[path], stored))
        exact = w + delta.scale * (delta.past["b"].double() @ delta.past["a"].double())
        assert torch.allclose(stored, exact.bfloat16().double(), atol=0, rtol=2**-8)
        lost, whole = lost + float((stored - exact).square().sum()), whole + float(exact.square().sum())
        change += float((exact - w).square().sum())
    assert rounding.of_weight == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert rounding.of_change == pytest.approx((lost / change) ** 0.5, rel=1e-4)
    assert 0 < rounding.of_weight < 2**-9


def test_quantized_and_tied_weights_keep_their_past_beside(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype="float32").network
    adapter = attach(model, config_from("lora", {"rank": 2}), ("embed_tokens", "q_proj"))
    assert Folding(adapter, "auto").paths == [p for p in adapter.deltas if "q_proj" in p]
    assert Folding(adapter, "beside").paths == []
    with pytest.raises(ConfigError, match=r"1 of 3 weights .*\n.*embed_tokens: it is shared with another layer"):
        Folding(adapter, "weight")
    net = Net()
    store_(net, NF4Config(block=32), ["one"])
    stored = attach(net, config_from("lora", {"rank": 2}), ("one", "other"))
    assert Folding(stored, "auto").paths == ["other"]
    with pytest.raises(ConfigError, match="one: it is kept as NF4, which has no room for small changes"):
        Folding(stored, "weight")
