"""AdamW with float32 state: torch's own, fused over each parameter.

Source: Loshchilov and Hutter 2017, arXiv:1711.05101.  Fused is the fastest of torch's three implementations on a CPU;
its default there, foreach, is the slowest.
"""

import torch

from veneer.train.optim.groups import OPTIMIZERS, Groups
from veneer.train.settings import OptimizerSettings


@OPTIMIZERS.add("adamw")
def adamw(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW; the groups bring their own rate and decay."""
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
