"""A method that is one new file: it trains, is saved, loaded, merged, said in LoRA and listed; nobody else knows it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.methods.parity import TOKENS, fresh, logits
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import ConfigError
from veneer.merge.export import as_lora
from veneer.merge.fold import merge
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig, Role, config_from


@dataclass(frozen=True, kw_only=True)
class GainConfig(MethodConfig):
    method: ClassVar[str] = "gain"
    start: float = 0.0


class Gain(Delta):
    """y' = (1 + g) y, one number a layer."""

    Config = GainConfig
    roles: ClassVar[Mapping[str, Role]] = {"g": "scale"}

    def __init__(self, layer: FrozenLayer, config: GainConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.g = nn.Parameter(torch.full((1,), config.start))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + y * self.g.to(y.dtype)

    def fold(self, w: Tensor) -> Tensor:
        return w * (1 + self.g)

    def fold_bias(self, bias: Tensor) -> Tensor:
        return bias * (1 + self.g)

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: GainConfig) -> int:
        return 1

    def tensors(self) -> dict[str, Tensor]:
        return {"gain": self.g}

    @classmethod
    def to_peft(cls, config: GainConfig) -> dict[str, Any]:
        return {"peft_type": "GAIN", "start": config.start}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> GainConfig | None:
        return GainConfig(start=fields["start"]) if fields.get("peft_type") == "GAIN" else None


@pytest.fixture
def gain() -> Iterator[MethodConfig]:
    METHODS.add("gain")(Gain)
    try:
        yield config_from("gain", {"start": 0})
    finally:
        del METHODS._things["gain"]


def test_its_whole_life(gain: MethodConfig, tiny_model: Path, tmp_path: Path) -> None:
    assert "gain" in list(METHODS)
    model = fresh(tiny_model)
    plain = logits(model)
    adapter = attach(model, gain)
    assert torch.equal(logits(model), plain)
    step = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        step.zero_grad()
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert adapter.n_params() == len(adapter.deltas) == 14
    trained = logits(model)
    adapter.save(tmp_path / "adapter")
    merge(adapter, tiny_model, tmp_path / "merged")
    assert torch.allclose(logits(fresh(tmp_path / "merged")), trained, atol=1e-5)
    made = as_lora(adapter, rank=64)
    adapter.detach()
    assert torch.equal(logits(model), plain)
    made.adapter.attach()
    assert torch.allclose(logits(model), trained, atol=1e-3)
    made.adapter.detach()
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), trained)


def test_its_name_is_taken_and_its_settings_are_checked(gain: MethodConfig) -> None:
    with pytest.raises(ConfigError, match="method 'gain' is already registered"):
        METHODS.add("gain")(Gain)
    with pytest.raises(ConfigError, match=r"method gain has no setting 'strat'. Did you mean 'start'"):
        config_from("gain", {"strat": 1})
    with pytest.raises(ConfigError, match=r"there is no method 'gian'. Did you mean 'gain'"):
        METHODS["gian"]
