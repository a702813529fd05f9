"""The base class of inits (where LoRA's A and B start), and the registry of all inits.

A recipe names one with its settings: `init: pissa`, `init: {name: pissa, iterations: 4}`.  A new init is one new file.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base import FrozenLayer, Kind
from veneer.registry import Registry
from veneer.settings import typed

InitSetting = str | bool | Mapping[str, Any]
"""An init by name, by PEFT's name, or with its settings."""


class LowRank(Protocol):
    """An init's view of a LoRA delta; a (R, D, *kernel) and b (O, R) have their shapes, not yet their values."""

    kind: Kind
    scale: float
    a: Any
    b: Any

    def weight(self) -> Tensor:
        """W (O, D, *kernel) float32, with all finished cycles."""


@dataclass(frozen=True, kw_only=True)
class Init(ABC):
    """Where A and B start; the fields of a subclass are its settings."""

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    """The layers it can start on."""
    drawn: ClassVar[bool] = False
    """A and B are random numbers alone, so variants of LoRA (DoRA) can start there too."""
    no_change: ClassVar[bool] = True
    """The new delta changes nothing."""
    subtracted: ClassVar[bool] = False
    """B A starts away from 0, and the delta subtracts a fixed copy of it; for linear layers only."""
    in_peft: ClassVar[str | bool] = True
    """`init_lora_weights` in the adapter's adapter_config.json."""

    def refuse_layer(self, layer: FrozenLayer, method: str, rank: int) -> None:
        """Raise ConfigError by name for a layer it cannot start on; the layer's weight is not read."""
        if layer.kind not in self.kinds:
            raise ConfigError(
                f"{method}.init {self.name} starts on layers of kind {', '.join(sorted(self.kinds))} only, and this "
                f"layer is of kind {layer.kind}; exclude it, or take another init"
            )

    @abstractmethod
    def factors(self, delta: LowRank, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A and B at the start of a training or of a cycle, float32."""


INITS: Registry[type[Init]] = Registry("init")


class DrawnInit(Init):
    """A drawn, B = 0.  On an embedding A is a look-up table: it starts at 0, and B ~ N(0, 1)."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    drawn: ClassVar[bool] = True

    def factors(self, delta: LowRank, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        rank = len(delta.a)
        if delta.kind == "embedding":
            b = torch.empty(delta.b.shape).normal_(generator=rng)
            return self.other(delta.a.shape, rank, rng), b
        a = self.draw(delta.a.shape, rank, rng)
        return a, self.other(delta.b.shape, rank, rng)

    @abstractmethod
    def draw(self, shape: torch.Size, rank: int, rng: torch.Generator) -> Tensor:
        """A, of this shape."""

    def other(self, shape: torch.Size, rank: int, rng: torch.Generator) -> Tensor:
        """B, of this shape."""
        return torch.zeros(shape)


def init_setting(given: Any) -> Any:
    """The canonical form of an init: its name alone, or a mapping of its name and settings.

    PEFT's `init_lora_weights` is accepted: true, false, "pissa_niter_16".
    """
    if isinstance(given, bool):
        return "uniform" if given else "random"
    if isinstance(given, str) and (iterations := re.fullmatch(r"pissa_niter_(\d+)", given)):
        return {"name": "pissa", "iterations": int(iterations[1])}
    return given["name"] if isinstance(given, Mapping) and list(given) == ["name"] else given


def init_from(given: InitSetting) -> Init:
    """The typed init; raises ConfigError for an unknown name or setting, with close matches."""
    given = init_setting(given)
    settings = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"an init is a name or a mapping with a name, like {{name: pissa}}, got {given!r}")
    return typed("init", name, INITS[name], settings)
