"""Parameter groups by role: which learning rate, which weight decay.

Source: LoRA+, arXiv:2402.12354: "out" factors (LoRA's B) learn at lr_ratio times the rate of the others.
Departs from the authors' code: it reads parameter names and gives every 1-D parameter the ratio too; here a parameter's
role decides, and biases and scales keep the plain rate. Both factors on a token embedding take lr_embedding where it is
given; the authors' code gives them 1e-6 unless told otherwise, which all but freezes them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.part import NamedParameter
from veneer.errors import ConfigError
from veneer.recipe.settings import OptimizerSettings
from veneer.registry import Registry

Groups = list[dict[str, Any]]
OPTIMIZERS: Registry[Callable[[Groups, OptimizerSettings, Path | None], torch.optim.Optimizer]] = Registry("optimizer")

NOT_DECAYED = ("scale", "bias")


def parameter_groups(named: Sequence[NamedParameter], settings: OptimizerSettings) -> Groups:
    """One group per role present, in a fixed order, each with `role`, `base_lr`, `lr` and `weight_decay`.

    What has a rate of its own by its place is a group by itself: `embedding in`, `embedding out`, `prompt full`.
    Raises ConfigError for a ratio, a rate or a decay that no parameter would take.
    """
    own = {"embedding": settings.lr_embedding, "prompt": settings.lr_prompt}
    _refuse_idle(named, settings, own)
    members: dict[tuple[str, str], list[Any]] = {}
    for n in named:
        place: str = n.place if own.get(n.place) is not None else ""
        members.setdefault((place, n.role), []).append(n.parameter)
    groups: Groups = []
    for (place, role), parameters in sorted(members.items()):
        lr = own.get(place) or settings.lr * (settings.lr_ratio if role == "out" else 1.0)
        decay = 0.0 if role in NOT_DECAYED else settings.weight_decay
        label = f"{place} {role}".strip()
        groups.append({"params": parameters, "role": label, "base_lr": lr, "lr": lr, "weight_decay": decay})
    return groups


def _refuse_idle(named: Sequence[NamedParameter], settings: OptimizerSettings, own: Mapping[str, float | None]) -> None:
    roles = {n.role for n in named}
    for place, rate in own.items():
        if rate is not None and not any(n.place == place for n in named):
            what = "changes no token embedding" if place == "embedding" else "trains no prompt"
            raise ConfigError(f"optimizer.lr_{place} is {rate}, but this run {what}; leave it out")
    ratioed = {n.role for n in named if own.get(n.place) is None}
    if settings.lr_ratio != 1 and "out" not in ratioed:
        raise ConfigError(
            f'optimizer.lr_ratio is {settings.lr_ratio}, but this run has no "out" factors that would take it, only '
            f"{', '.join(sorted(roles))}; leave it at 1"
        )
    if settings.weight_decay and roles <= set(NOT_DECAYED):
        raise ConfigError(
            f"optimizer.weight_decay is {settings.weight_decay}, but this method trains only "
            f"{' and '.join(sorted(roles))} parameters, which are never decayed; leave it at 0"
        )


def build_optimizer(
    named: Sequence[NamedParameter], settings: OptimizerSettings, folder: Path | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the adapter's parameters; paged state lies in `folder`, else the cache folder."""
    return OPTIMIZERS[settings.name](parameter_groups(named, settings), settings, folder)


def set_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Scale every group's own rate; returns the rate in force by role."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiplier
    return {group["role"]: group["lr"] for group in optimizer.param_groups}
