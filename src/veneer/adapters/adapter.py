"""What a training leaves on a model: deltas on its layers (Adapter), a prompt before its tokens (Prompted), or both.

Training, evaluation and generation know only these verbs, so they need not ask which of the three they have.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn

from veneer.methods.base import Delta, MethodConfig, Role

Place = Literal["layer", "embedding", "prompt"]
"""Where a parameter works: on a layer, on a token embedding, or in front of the tokens."""


@dataclass(frozen=True)
class Named:
    """One trained parameter with what it is to its delta."""

    path: str
    """The module it changes."""
    name: str
    role: Role
    parameter: nn.Parameter
    place: Place = "layer"


class Change(ABC):
    """A trained change of one model, that can be put on and taken off again."""

    model: Any
    base: str
    """The name by which others find the base model."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The method's or the prompt's name, for messages."""

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether the model's outputs are changed now."""

    @abstractmethod
    def attach(self) -> Self:
        """Change the model and freeze the base; does nothing if attached."""

    @abstractmethod
    def detach(self) -> Self:
        """Take the change off again and restore which parameters of the base are trained."""

    @contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """The base alone for a while, as it was."""
        was = self.attached
        self.detach()
        try:
            yield self.model
        finally:
            if was:
                self.attach()

    @abstractmethod
    def holders(self) -> Mapping[str, nn.Module]:
        """The modules that hold what is trained, and its buffers, by path."""

    @abstractmethod
    def named(self) -> list[Named]:
        """Every trained parameter with path, name and role, in a fixed order."""

    @abstractmethod
    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> int:
        """Write an adapter folder, PEFT's where PEFT has a word for it, with `facts` beside; returns its bytes."""

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """The deltas on layers, by path; none where only a prompt is trained."""
        return {}

    @property
    def settings(self) -> MethodConfig | None:
        """Those of the method; None where only a prompt is trained."""
        return None

    def penalty(self) -> Tensor | None:
        """What is added to the loss of every step; None for nothing."""
        return None

    def stepped_(self, step: int, steps: int) -> None:  # noqa: B027 (few have a schedule)
        """Called after optimizer step `step` of `steps`, gradients still there."""

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return [n.parameter for n in self.named()]

    def n_params(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def train(self, mode: bool = True) -> Self:
        """Turn dropout on or off."""
        for holder in self.holders().values():
            holder.train(mode)
        return self

    def eval(self) -> Self:
        """Turn dropout off."""
        return self.train(False)
