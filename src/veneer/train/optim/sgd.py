"""Stochastic gradient descent by torch's implementation, with its form of momentum.

State: one float32 number a parameter with momentum, none without.
"""

from pathlib import Path

import torch

from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim.param_groups import OPTIMIZERS, Groups


@OPTIMIZERS.add("sgd")
def sgd(groups: Groups, settings: OptimizerSettings, folder: Path | None) -> torch.optim.Optimizer:
    """SGD; the groups bring their own rate."""
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
