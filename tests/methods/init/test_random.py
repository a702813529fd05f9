"""Random: both factors drawn, so the model changes at once."""

import pytest
import torch

from tests.methods.layers import delta_on, linear, rows, through
from veneer.errors import ConfigError
from veneer.methods.lora import LoRA, LoRAConfig
from veneer.methods.restartable import refuse_restarts

CONFIG = LoRAConfig(rank=32, init="random")


def test_both_factors_are_drawn_within_their_bounds() -> None:
    delta = delta_on(linear(64, 48), CONFIG)
    assert 0.97 * 64**-0.5 < delta.a.abs().max() <= 64**-0.5
    assert 0.97 * 32**-0.5 < delta.b.abs().max() <= 32**-0.5
    assert torch.count_nonzero(delta.b) == delta.b.numel()


def test_the_model_changes_and_restarts_are_refused() -> None:
    module, x = linear(64, 48), rows(3, 64)
    assert not torch.allclose(through(module, delta_on(module, CONFIG), x), module(x), atol=1e-2)
    with pytest.raises(ConfigError, match=r"lora.init random starts with a change of the model"):
        refuse_restarts(CONFIG)


def test_its_name_in_peft() -> None:
    assert LoRA.to_peft(CONFIG)["init_lora_weights"] is False
    assert LoRA.from_peft(LoRA.to_peft(CONFIG)) == LoRAConfig(rank=32, init="random")
