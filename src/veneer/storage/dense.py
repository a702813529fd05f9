"""Dense: the weight unchanged, in its own dtype."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import ModelError
from veneer.storage.base import STORAGES, Storage, StorageConfig, check_ids, check_matrix


@dataclass(frozen=True, kw_only=True)
class DenseConfig(StorageConfig):
    """No settings."""

    storage = "dense"


@STORAGES.add("dense")
class Dense(Storage):
    """W itself."""

    Config = DenseConfig
    weight: Tensor

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", w.detach(), persistent=False)
        self.shape, self.dtype = (w.shape[0], w.shape[1]), w.dtype

    @classmethod
    def of(cls, w: Tensor, config: DenseConfig, name: str = "weight") -> Self:
        check_matrix(w, name)
        return cls(w)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype, copy=True)

    def put_(self, w: Tensor) -> None:
        self.weight.copy_(w)

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        check_ids(ids, self.shape[0])
        return self.weight[ids].to(dtype)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {name: self.weight}

    @classmethod
    def recognizes(cls, keys: Mapping[str, Tensor], name: str) -> bool:
        alone = not any(k.startswith(f"{name}.") for k in keys)
        return name in keys and keys[name].is_floating_point() and alone

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        if name not in tensors:
            raise ModelError(f"{name}: no tensor of this name")
        return cls.of(tensors[name], DenseConfig(), name)
