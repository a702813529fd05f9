"""Lion by lion-pytorch's implementation: steps by the sign of a blend of gradient and momentum.

Source: Chen et al. 2023, arXiv:2302.06675.  State: one float32 number a parameter.  All numbers move by the same
amount, so it wants a rate 3 to 10 times lower than AdamW's, and as much more decay.
"""

from pathlib import Path

import torch

from veneer.errors import ConfigError
from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim.param_groups import OPTIMIZERS, Groups

BETAS = (0.9, 0.99)
"""The paper's."""


@OPTIMIZERS.add("lion")
def lion(groups: Groups, settings: OptimizerSettings, folder: Path | None) -> torch.optim.Optimizer:
    """Lion; the groups bring their own rate and decay.  Raises ConfigError without lion-pytorch."""
    try:
        from lion_pytorch import Lion
    except ImportError as error:
        raise ConfigError(
            "optimizer.name is lion, which needs lion-pytorch, and that is not installed: pip install 'veneer[lion]'"
        ) from error
    made: torch.optim.Optimizer = Lion(groups, lr=settings.lr, betas=settings.betas or BETAS)
    return made
