"""Parameter groups by role: which learning rate, which weight decay.

Source: LoRA+, arXiv:2402.12354: "out" factors (LoRA's B) learn at lr_ratio times the rate of the others.
Departs from the authors' code: it reads parameter names and gives every 1-D parameter the ratio too; here a parameter's
role decides, and biases and scales keep the plain rate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from veneer.adapters.attach import Named
from veneer.errors import ConfigError
from veneer.registry import Registry
from veneer.train.settings import OptimizerSettings

Groups = list[dict[str, Any]]
OPTIMIZERS: Registry[Callable[[Groups, OptimizerSettings], torch.optim.Optimizer]] = Registry("optimizer")

NOT_DECAYED = ("scale", "bias")


def parameter_groups(named: Sequence[Named], settings: OptimizerSettings) -> Groups:
    """One group per role present, in a fixed order, each with `role`, `base_lr`, `lr` and `weight_decay`.

    Raises ConfigError for a ratio or a decay that no parameter would take.
    """
    groups: Groups = []
    roles = {n.role for n in named}
    if settings.lr_ratio != 1 and "out" not in roles:
        raise ConfigError(
            f'optimizer.lr_ratio is {settings.lr_ratio}, but this method has no "out" factors, only '
            f"{', '.join(sorted(roles))}; leave it at 1"
        )
    if settings.weight_decay and roles <= set(NOT_DECAYED):
        raise ConfigError(
            f"optimizer.weight_decay is {settings.weight_decay}, but this method trains only "
            f"{' and '.join(sorted(roles))} parameters, which are never decayed; leave it at 0"
        )
    for role in sorted(roles):
        lr = settings.lr * (settings.lr_ratio if role == "out" else 1.0)
        decay = 0.0 if role in NOT_DECAYED else settings.weight_decay
        members = [n.parameter for n in named if n.role == role]
        groups.append({"params": members, "role": role, "base_lr": lr, "lr": lr, "weight_decay": decay})
    return groups


def build_optimizer(named: Sequence[Named], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The recipe's optimizer over the adapter's parameters."""
    return OPTIMIZERS[settings.name](parameter_groups(named, settings), settings)


def set_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Scale every group's own rate; returns the rate in force by role."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiplier
    return {group["role"]: group["lr"] for group in optimizer.param_groups}
