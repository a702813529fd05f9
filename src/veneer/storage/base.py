"""What a storage is: the holder of one frozen weight W (O, D), its settings, and the registry of all of them.

Whoever needs W asks for `matmul`, `rows` or `dense`; nobody else knows how it is kept. On disk a storage is a few
tensors whose names start with the weight's own (`tensors`, `from_tensors`).
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
    """Settings of one storage; subclasses add typed fields with unit and range below each."""

    storage: ClassVar[str]


class Storage(nn.Module, ABC):
    """One frozen weight W (O, D).  Its tensors are buffers outside of any state dict; `tensors` names them for disk."""

    Config: ClassVar[type[StorageConfig]]
    shape: tuple[int, int]
    """O and D."""
    dtype: torch.dtype
    """The number type of the weight it was made from."""
    read_ahead: bool = False
    """Whether what is computed with comes from disk ahead of each use, and `tensors` are mapped for other purposes."""

    @classmethod
    @abstractmethod
    def of(cls, w: Tensor, config: Any, name: str = "weight") -> Self:
        """Keep the dense W (O, D).  Raises ModelError, with `name`, for a weight that cannot be kept this way."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (O, D) in `dtype`, a tensor of its own."""

    @abstractmethod
    def put_(self, w: Tensor) -> None:
        """Replace W in place by another of the same shape, kept with the same settings."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """y (..., O) = x (..., D) W^T in x's dtype, with a gradient for x."""

    @abstractmethod
    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W by number: ids (...) -> (..., D); IndexError for a number outside [0, O)."""

    @abstractmethod
    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is written for the weight `name` (for example `model.layers.0.self_attn.q_proj.weight`)."""

    @classmethod
    @abstractmethod
    def recognizes(cls, keys: Mapping[str, Tensor], name: str) -> bool:
        """Whether `keys` hold the weight `name` in this storage's layout, right or wrong."""

    @classmethod
    @abstractmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        """The storage of the weight `name` from its tensors, without a copy where alignment allows.

        Raises ModelError that lists everything wrong; nothing is half-loaded.
        """

    def take_(self, other: "Storage") -> None:
        """Become `other` in place, so that whoever shares this storage sees the new weight; both of one class."""
        fresh = vars(nn.Module()).keys() - {"_buffers"}
        self.__dict__.update({key: value for key, value in vars(other).items() if key not in fresh})

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device; `model.to(dtype)` must not change the numbers a weight is kept in."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, old in before.items():
            new = self._buffers[key]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[key] = old.to(new.device)
        self.moved()
        return self

    def moved(self) -> None:
        """Called after buffers were replaced."""


STORAGES: Registry[type[Storage]] = Registry("storage")


def config_from(storage: str, settings: Mapping[str, Any]) -> StorageConfig:
    """Typed settings of `storage`; raises ConfigError for a field it does not have, with close matches."""
    return typed("storage", storage, STORAGES[storage].Config, settings)


def from_tensors(tensors: Mapping[str, Tensor], name: str) -> Storage:
    """The storage of the weight `name`, in whichever layout its tensors are.  Raises ModelError if it is in none."""
    for kind in STORAGES:
        if STORAGES[kind].recognizes(tensors, name):
            return STORAGES[kind].read(tensors, name)
    near = [k for k in tensors if k.startswith(name)]
    raise ModelError(f"{name}: no storage knows this layout; found {', '.join(near) or 'no tensor of this name'}")


def check_matrix(w: Tensor, name: str) -> None:
    """Refuse what is no weight matrix of finite floating-point numbers (finiteness is left to the quantizer)."""
    if w.dim() != 2 or w.numel() == 0 or not w.is_floating_point() or w.dtype.itemsize < 2:
        raise ModelError(f"{name}: {tuple(w.shape)} {w.dtype} is no matrix of floating-point numbers from 16 bits on")


def check_ids(ids: Tensor, rows: int) -> None:
    """Refuse row numbers outside [0, rows)."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise IndexError(f"row numbers from {int(ids.min())} to {int(ids.max())} are outside [0, {rows})")
