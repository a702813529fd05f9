"""Lion against the algorithm of its paper in NumPy, and against its library; without the library it is refused."""

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from torch import nn

from tests.train.optim.by_torch import ByTorch
from veneer.adapters.part import NamedParameter
from veneer.errors import ConfigError
from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim import build_optimizer


def by_the_paper(w: Any, gradients: list[Any], lr: float, betas: tuple[float, float], decay: float) -> Any:
    """Algorithm 2 of arXiv:2302.06675, float64."""
    m = np.zeros_like(w)
    for g in gradients:
        w = w - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + decay * w)
        m = betas[1] * m + (1 - betas[1]) * g
    return w


@pytest.mark.parametrize("betas", [None, (0.8, 0.95)])
def test_it_is_the_papers(betas: tuple[float, float] | None) -> None:
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=(3, 5)), [rng.normal(size=(3, 5)) for _ in range(30)]
    parameter = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    settings = OptimizerSettings(name="lion", lr=0.03, betas=betas, weight_decay=0.2)
    optimizer = build_optimizer([NamedParameter("layer", "a", "in", parameter)], settings)
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    want = by_the_paper(w, gradients, 0.03, betas or (0.9, 0.99), 0.2)
    assert np.abs(parameter.detach().numpy() - want).max() < 1e-5


def test_without_its_library_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    named = [NamedParameter("layer", "a", "in", nn.Parameter(torch.zeros(2)))]
    with pytest.raises(ConfigError, match=r"needs lion-pytorch.*pip install 'veneer\[lion\]'"):
        build_optimizer(named, OptimizerSettings(name="lion"))


class TestLion(ByTorch):
    own: ClassVar[Mapping[str, Any]] = {"name": "lion"}

    def theirs(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = Lion(groups, betas=(0.9, 0.99))
        return made
