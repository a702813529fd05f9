"""An init that is one new file: lora starts from it, a recipe names it, and nothing else knows it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.methods.layers import linear, rows
from veneer.adapters.attach import attach
from veneer.errors import ConfigError
from veneer.methods.base import config_from
from veneer.methods.init.base import INITS, Init, LowRank
from veneer.methods.lora import LoRA, LoRAConfig


@dataclass(frozen=True, kw_only=True)
class Corner(Init):
    """B A starts as the weight's upper left corner, and that start is subtracted."""

    name: ClassVar[str] = "corner"
    subtracted: ClassVar[bool] = True
    times: float = 1.0

    def factors(self, delta: LowRank, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        rank, w = len(delta.a), delta.weight()
        return torch.eye(*delta.a.shape), torch.eye(*delta.b.shape) @ w[:rank, :rank] * self.times


@pytest.fixture
def corner() -> Iterator[LoRAConfig]:
    INITS.add("corner")(Corner)
    try:
        yield LoRAConfig(rank=2, init={"name": "corner", "times": 0.5})
    finally:
        del INITS._things["corner"]


def test_lora_starts_from_it_trains_and_restarts(corner: LoRAConfig) -> None:
    net, x = nn.Sequential(linear(6, 5), linear(5, 6)), rows(4, 6)
    plain = net(x)
    adapter = attach(net, corner)
    assert torch.equal(net(x), plain)
    delta = adapter.deltas["0"]
    assert isinstance(delta, LoRA)
    assert torch.allclose((delta.b @ delta.a)[:2, :2], net[0].weight[:2, :2] / 2)
    step = torch.optim.SGD(adapter.parameters(), lr=0.1)
    net(x).square().sum().backward()
    step.step()
    trained = net(x)
    assert not torch.allclose(trained, plain, atol=1e-3)
    w = net[0].weight
    start = torch.eye(5, 2) @ w[:2, :2] @ torch.eye(2, 6) / 2
    assert torch.allclose(delta.fold(w), w + delta.scale * (delta.b @ delta.a - start), atol=1e-6)
    for one in (delta, adapter.deltas["1"]):
        assert isinstance(one, LoRA)
        one.remember_()
        one.restart_(torch.Generator())
    assert torch.allclose(net(x), trained, atol=1e-5)


def test_it_is_known_by_name_and_its_settings_are_checked(corner: LoRAConfig) -> None:
    assert config_from("lora", {"init": "corner"}) == LoRAConfig(init="corner")
    with pytest.raises(ConfigError, match=r"init corner has no setting 'tmes'. Did you mean 'times'"):
        config_from("lora", {"init": {"name": "corner", "tmes": 2}})
    with pytest.raises(ConfigError, match=r"dora.init must be one of gaussian, random, uniform, got 'corner'"):
        config_from("dora", {"init": "corner"})
