"""Uniform: A within 1 / sqrt(fan in), B at zero; PEFT draws A the same way."""

import math

import pytest
import torch
from torch import nn

from tests.methods.layers import delta_on, linear
from veneer.methods.init.uniform import uniform
from veneer.methods.lora import LoRA, LoRAConfig


@pytest.mark.parametrize("fan_in", [16, 100])
def test_the_numbers_are_kaimings_with_a_root_5(fan_in: int) -> None:
    ours = uniform(torch.Size((300, fan_in)), fan_in, torch.Generator().manual_seed(7))
    theirs = nn.init.kaiming_uniform_(
        torch.empty(300, fan_in), a=math.sqrt(5), generator=torch.Generator().manual_seed(7)
    )
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_it_is_the_default_and_pefts_true() -> None:
    assert LoRAConfig() == LoRAConfig(init="uniform") == LoRAConfig(init=True) == LoRAConfig(init={"name": "uniform"})
    assert LoRA.to_peft(LoRAConfig())["init_lora_weights"] is True
    delta = delta_on(linear(9, 6), LoRAConfig(rank=3), seed=4)
    assert torch.equal(delta.a, uniform(torch.Size((3, 9)), 9, torch.Generator().manual_seed(4)))
    assert torch.count_nonzero(delta.b) == 0
