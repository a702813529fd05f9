"""Base class of storages: a storage holds one frozen weight W (O, D) in some format.  Also their settings and registry.

Other code uses only `matmul`, `rows` and `dense`, and does not know the format. On disk a storage is a few tensors
whose names start with the weight's name (`tensors`, `from_tensors`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.registry import Registry
from veneer.settings import typed


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Settings of one storage; subclasses add typed fields, each documented with unit and range."""

    storage: ClassVar[str]


class Storage(nn.Module, ABC):
    """One frozen weight W (O, D).  Its tensors are non-persistent buffers; `tensors` names them for disk."""

    Config: ClassVar[type[StorageConfig]]
    shape: tuple[int, int]
    """O and D."""
    dtype: torch.dtype
    """The dtype of the original weight."""
    read_ahead: bool = False
    """Whether the buffers used in products are read from disk before each use (weight paging)."""

    @classmethod
    @abstractmethod
    def of(cls, w: Tensor, config: Any, name: str = "weight") -> Self:
        """Store the dense W (O, D).  Raises ModelError, with `name`, if this format cannot hold it."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """A copy of W (O, D) in `dtype`."""

    @abstractmethod
    def put_(self, w: Tensor) -> None:
        """Replace W in place by another weight of the same shape, with the same settings."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """y (..., O) = x (..., D) W^T in x's dtype, with a gradient for x."""

    @abstractmethod
    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up rows of W: ids (...) -> (..., D).  Raises IndexError for an id outside [0, O)."""

    @abstractmethod
    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors written for the weight `name` (for example `model.layers.0.self_attn.q_proj.weight`)."""

    @classmethod
    @abstractmethod
    def recognizes(cls, keys: Mapping[str, Tensor], name: str) -> bool:
        """Whether `keys` hold the weight `name` in this storage's layout, valid or not."""

    @classmethod
    @abstractmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        """Load the weight `name` from its tensors, without a copy where alignment allows.

        Raises ModelError that lists all problems.
        """

    def take_(self, other: "Storage") -> None:
        """Take over the contents of `other`, of the same class; modules that share this storage see the new weight."""
        fresh = vars(nn.Module()).keys() - {"_buffers"}
        self.__dict__.update({key: value for key, value in vars(other).items() if key not in fresh})

    @property
    def nbytes(self) -> int:
        """Size of all its tensors in bytes."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device; `model.to(dtype)` must not convert the stored tensors."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, old in before.items():
            new = self._buffers[key]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[key] = old.to(new.device)
        self.moved()
        return self

    def moved(self) -> None:
        """Hook: called after buffers were replaced."""


STORAGES: Registry[type[Storage]] = Registry("storage")


def config_from(storage: str, settings: Mapping[str, Any]) -> StorageConfig:
    """Typed settings of `storage`.  Raises ConfigError for an unknown field, with close matches."""
    return typed("storage", storage, STORAGES[storage].Config, settings)


def from_tensors(tensors: Mapping[str, Tensor], name: str) -> Storage:
    """Load the weight `name` in whichever layout its tensors have.  Raises ModelError if none matches."""
    for kind in STORAGES:
        if STORAGES[kind].recognizes(tensors, name):
            return STORAGES[kind].read(tensors, name)
    near = [k for k in tensors if k.startswith(name)]
    raise ModelError(f"{name}: no storage has this layout; found {', '.join(near) or 'no tensor of this name'}")


def check_matrix(w: Tensor, name: str) -> None:
    """Raise ModelError unless w is a floating-point matrix of at least 16 bits (quantizers check finiteness)."""
    if w.dim() != 2 or w.numel() == 0 or not w.is_floating_point() or w.dtype.itemsize < 2:
        raise ModelError(f"{name}: {tuple(w.shape)} {w.dtype} is not a floating-point matrix of at least 16 bits")


def check_ids(ids: Tensor, rows: int) -> None:
    """Raise IndexError for ids outside [0, rows)."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())} are outside [0, {rows})")
