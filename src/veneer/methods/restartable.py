"""Methods whose change can be folded in and begun anew during training: ReLoRA, ReMoRA.

A restart ends a cycle: `remember_` moves the trained change into `past`, which is no longer trained, and `restart_`
initializes a new one.  The adapter is all cycles together; `forward`, `fold` and `tensors` include the past.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig

_INSTEAD = "use lora, dora, or mora with variant sharing, or leave restarts out"


class Restartable(Delta):
    """A delta that keeps its finished cycles beside the one in training."""

    past: dict[str, Tensor]
    """The change of all finished cycles, float32, not trained; empty before the first restart."""
    past_in_weight: bool = False
    """True while the layer's own weight includes the past, so that `forward` leaves it out."""

    @abstractmethod
    def __init__(self, layer: FrozenLayer, config: Any, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.past = {}

    @classmethod
    def refuse_restarts(cls, config: Any) -> None:
        """Raise ConfigError by name for settings with which restarts cannot widen the change."""

    @abstractmethod
    def remember_(self) -> None:
        """End a cycle: the trained change joins the past.  `restart_` follows once the layer's weight is in place."""

    @abstractmethod
    def restart_(self, rng: torch.Generator) -> None:
        """Initialize the trained change again, in place, so that it changes nothing."""

    @abstractmethod
    def fold_past(self, w: Tensor) -> Tensor:
        """W (O, D, *kernel) float32, the base's own -> W with the finished cycles alone."""

    @abstractmethod
    def now(self, config: Any) -> Any:
        """The adapter's settings after the restarts so far (a higher rank; MoRA's grouping)."""

    @classmethod
    @abstractmethod
    def n_past(cls, layer: FrozenLayer, config: Any, cycles: int) -> int:
        """Numbers in the past of `layer` after `cycles` finished cycles, in closed form."""


def restartable(deltas: Mapping[str, Delta]) -> dict[str, Restartable]:
    """The deltas, by path, that can be restarted."""
    return {path: delta for path, delta in deltas.items() if isinstance(delta, Restartable)}


def refuse_restarts(config: MethodConfig) -> None:
    """Raise ConfigError by name where restarts of this method are impossible or gain nothing."""
    method = METHODS[config.method]
    if issubclass(method, Restartable):
        method.refuse_restarts(config)
    elif method.fold is Delta.fold:
        raise ConfigError(
            f"{config.method} cannot be restarted: a restart folds the change into a weight, and a {config.method} is "
            f"no change of one weight; {_INSTEAD}"
        )
    else:
        raise ConfigError(
            f"{config.method} gains nothing from restarts: cycles of it add up to what one of them can be; {_INSTEAD}"
        )
