"""A part of an adapter: one kind of change of a model, with its own settings and its own place in PEFT's files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.base.base import Base
from veneer.methods.base import Delta, MethodConfig, Role

Place = Literal["layer", "embedding", "prompt"]
"""Where a parameter works: on a layer, on a token embedding, or in front of the tokens."""
Fold = Callable[[Tensor], Tensor]
"""A weight or bias, float32, in the layout that a dense network keeps it in -> the changed one."""
PREFIX = "base_model.model."
"""Of every tensor's name in PEFT's files."""


@dataclass(frozen=True)
class NamedParameter:
    """One trained parameter with its role in its delta."""

    path: str
    """The module it changes."""
    name: str
    role: Role
    parameter: nn.Parameter
    place: Place = "layer"


class Part(ABC):
    """A trained change of one base that can be attached and detached; the adapter freezes the base."""

    folder: ClassVar[str] = "method"
    """Parts of one folder are saved as one PEFT adapter; an adapter with several folders has them side by side."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._hooks: list[RemovableHandle] = []
        """`attach` adds them."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The method's or the prompt's name, for messages; empty for a part that is not worth one."""

    @property
    def attached(self) -> bool:
        """Whether it changes the network's outputs now."""
        return bool(self._hooks)

    @abstractmethod
    def attach(self) -> None:
        """Change the network; called only when detached."""

    def detach(self) -> None:
        """Undo `attach`; does nothing if detached."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @abstractmethod
    def holders(self) -> Mapping[str, nn.Module]:
        """The modules that hold the trained parameters and their buffers, by path."""

    @abstractmethod
    def named(self) -> list[NamedParameter]:
        """Every trained parameter, in a fixed order."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under PEFT's names."""

    @abstractmethod
    def peft_fields(self) -> dict[str, Any]:
        """Its fields of adapter_config.json."""

    def facts(self) -> dict[str, Any]:
        """Its fields of veneer.json."""
        return {}

    def refuse_fold(self) -> None:  # noqa: B027 (most can be folded)
        """Raise NotFoldable, before any weight is read, where it cannot be folded into weights."""

    def folds(self) -> dict[str, Fold]:
        """For each weight that it changes, by its name in the network, what makes the changed weight of the base's."""
        return {}

    @property
    def vocabulary(self) -> int:
        """How many rows of a token embedding it needs; 0 if it has nothing to do with tokens."""
        return 0

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """The method's deltas, by module path; empty for other parts."""
        return {}

    @property
    def settings(self) -> MethodConfig | None:
        """The method's settings; None for other parts."""
        return None
