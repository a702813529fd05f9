"""Gaussian: A normal with PEFT's spread, B at zero, and PEFT's name in the folder."""

import pytest
import torch

from tests.methods.layers import delta_on, linear, rows, through
from veneer.methods.lora import LoRA, LoRAConfig

CONFIG = LoRAConfig(rank=32, init="gaussian")


def test_a_is_normal_and_b_zero() -> None:
    delta = delta_on(linear(64, 64), CONFIG)
    assert delta.a.std().item() == pytest.approx(1 / 32, rel=0.05)
    assert delta.a.abs().max() > 3 / 32
    assert torch.count_nonzero(delta.b) == 0


def test_a_new_delta_changes_nothing() -> None:
    module, x = linear(64, 64), rows(3, 64)
    assert torch.equal(through(module, delta_on(module, CONFIG), x), module(x))


def test_its_name_in_peft() -> None:
    assert LoRA.to_peft(CONFIG)["init_lora_weights"] == "gaussian"
    assert LoRA.from_peft(LoRA.to_peft(CONFIG)) == LoRAConfig(rank=32, init="gaussian")
