"""The figures of requantizing, on a small weight: small updates are lost, ones as large as the weight mostly kept."""

import pytest
import torch

from benchmarks.restart_on_4bit import drift, errors, updates
from tests.methods.layers import delta_on, linear, moved, rows
from veneer.methods.lora import LoRAConfig
from veneer.storage.nf4 import NF4, NF4Config


def test_small_updates_are_lost_and_large_ones_kept() -> None:
    torch.manual_seed(0)
    storage = NF4.of(rows(64, 128), NF4Config())
    delta = delta_on(linear(128, 64), LoRAConfig(rank=2, alpha=2.0))
    for seed in range(3):
        if seed:
            delta.remember_()
            delta.restart_(torch.Generator().manual_seed(seed))
        moved(delta, 0.05, seed=seed)
    cycles = {"w": updates(delta, 2)}
    assert len(cycles["w"]) == 3
    total = sum(b @ a for a, b in cycles["w"])
    assert torch.allclose(total, delta.fold(torch.zeros(64, 128)), atol=1e-6)
    small, large = (errors({"w": storage}, cycles, size) for size in (0.1, 1000.0))
    base = storage.dense(torch.float32)
    assert small["change_of_weight"] == pytest.approx(float(0.1 * total.norm() / base.norm()), rel=1e-4)
    assert small["in_turn"][-1] > 0.9 and small["plain"][-1] > 0.9
    assert large["at_once"] < 0.12
    assert 0 < drift({"w": storage}, 3) < 0.05
