"""Adafactor by torch's implementation: a second moment kept as row and column sums, no first.

Source: Shazeer and Stern 2018, arXiv:1804.04235.  State: R + D numbers for a matrix (R, D), as many as it has for a
vector.  The rate is relative: torch multiplies it by the root mean square of the parameter, at least 1e-3.
"""

from pathlib import Path

import torch

from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim.param_groups import OPTIMIZERS, Groups


@OPTIMIZERS.add("adafactor")
def adafactor(groups: Groups, settings: OptimizerSettings, folder: Path | None) -> torch.optim.Optimizer:
    """Adafactor; the groups bring their own rate and decay."""
    return torch.optim.Adafactor(groups, lr=settings.lr)
