"""AdamW against the algorithm of its paper, written out in NumPy."""

from typing import Any

import numpy as np
import torch
from torch import nn

from veneer.adapters.attach import Named
from veneer.train.optim import OPTIMIZERS, build_optimizer
from veneer.train.settings import OptimizerSettings


def by_the_paper(w: Any, gradients: list[Any], lr: float, betas: tuple[float, float], eps: float, decay: float) -> Any:
    """Algorithm 2 of arXiv:1711.05101, float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)
    return w


def test_it_is_the_papers() -> None:
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=(3, 5)), [rng.normal(size=(3, 5)) for _ in range(7)]
    parameter = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    settings = OptimizerSettings(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer([Named("layer", "a", "in", parameter)], settings)
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    want = by_the_paper(w, gradients, 0.03, (0.8, 0.95), 1e-3, 0.2)
    assert np.abs(parameter.detach().numpy() - want).max() < 1e-5


def test_its_state_is_float32() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([Named("layer", "a", "in", parameter)], OptimizerSettings())
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert {t.dtype for t in optimizer.state[parameter].values()} == {torch.float32}
    assert list(OPTIMIZERS) == ["adamw"]
