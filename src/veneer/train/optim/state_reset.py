"""What a restart leaves of the optimizer's state: nothing, a random share, the largest entries, or all.

Source: ReLoRA, arXiv:2307.05695, section 3: pruning the moments at a restart, so that old gradients do not pull the new
factors back to where the last cycle's were.
Departs from the authors' code: zero is zero there only in 99.9 % of entries; and one choice of entries holds for all
moments of a parameter, by the size of the first one, while there each moment is pruned for itself, which can leave an
entry with its first moment and without its second: that steps about 1 / sqrt(1 - beta2) times too far.  As there, the
step count of the bias correction stays: after a reset a first update is (1 - beta1) / sqrt(1 - beta2) learning rates
long (3.2 for 0.9 and 0.999), which is what the re-warm-up is for.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from veneer.errors import ConfigError

Reset = Literal["zero", "random", "magnitude", "none"]
COUNTERS = ("step",)
"""State that is no moment."""


@runtime_checkable
class StatefulOptimizer(Protocol):
    """An optimizer that keeps its moments in another form than one float tensor of the parameter's shape each."""

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's moments as float32, the first moment first; empty before its first step."""

    def put_moments_(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Keep these instead."""


@torch.no_grad()
def reset_(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], how: Reset, keep: float, rng: torch.Generator
) -> float:
    """Prune every parameter's moments in place; returns the share of their entries that this made, or found, zero.

    keep   share of entries that random and magnitude leave
    Raises ConfigError for a partial reset of an optimizer without moments of the parameters' shape.
    """
    zero, total = 0, 0
    for parameter in parameters:
        moments = _moments(optimizer, parameter)
        if how != "none" and moments:
            kept = _kept(next(iter(moments.values())), how, keep, rng)
            other = [name for name, moment in moments.items() if moment.shape != parameter.shape]
            if other and how != "zero":
                raise ConfigError(
                    f"restarts.reset {how} needs one number of state for each parameter, but "
                    f"{type(optimizer).__name__} keeps {', '.join(other)}; use reset zero or none"
                )
            for moment in moments.values():
                moment.mul_(kept) if moment.shape == kept.shape else moment.zero_()
            if isinstance(optimizer, StatefulOptimizer):
                optimizer.put_moments_(parameter, moments)
        zero += sum(int((moment == 0).sum()) for moment in moments.values())
        total += sum(moment.numel() for moment in moments.values())
    return zero / total if total else 0.0


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, StatefulOptimizer):
        return optimizer.moments(parameter)
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in COUNTERS}


def _kept(first: Tensor, how: Reset, keep: float, rng: torch.Generator) -> Tensor:
    """Which entries stay, as 0 and 1 in the moment's shape."""
    if how == "zero":
        return torch.zeros_like(first)
    if how == "random":
        return (torch.rand(first.shape, generator=rng) < keep).to(first.device, first.dtype)
    count = max(1, round(keep * first.numel()))
    kept = torch.zeros(first.numel(), dtype=first.dtype, device=first.device)
    kept[first.abs().flatten().topk(count, sorted=False).indices] = 1.0
    return kept.view(first.shape)
