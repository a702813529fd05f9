"""Modules whose weight is in a storage: linear layers (and GPT-2's Conv1D), embeddings, a tied output head.

They replace the model's own modules, compute the same, and save the storage's tensors to a state dict under the name of
the dense weight.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import ModelError, TargetError
from veneer.storage.base import STORAGES, Storage, StorageConfig, from_tensors

StoreWeight = Callable[[Tensor, StorageConfig, str], Storage]
"""The dense W (O, D), settings and the weight's name -> its storage."""


def store_weight(w: Tensor, config: StorageConfig, name: str) -> Storage:
    """Store W as its settings say."""
    return STORAGES[config.storage].of(w, config, name)


class Stored(nn.Module):
    """Base of the stored layers: the storage, and its tensors in a state dict."""

    storage: Storage
    saved: bool
    """False for a head tied to an embedding: the embedding saves the weight."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, D) in `dtype`, as adapters see the layer."""
        return self.storage.dense(dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.saved:
            destination.update(self.storage.tensors(f"{prefix}weight"))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """`rest` are local_metadata, strict, missing_keys, unexpected_keys and error_msgs."""
        bias = {k: v for k, v in state_dict.items() if k == f"{prefix}bias"}
        super()._load_from_state_dict(bias, prefix, *rest)
        error_msgs: list[str] = rest[-1]
        if not self.saved:
            return
        try:
            found = from_tensors({k: v for k, v in state_dict.items() if k.startswith(prefix)}, f"{prefix}weight")
        except ModelError as error:
            error_msgs.append(str(error))
            return
        if (type(found), found.shape) != (type(self.storage), self.storage.shape):
            given, wanted = (f"{type(s).__name__} {s.shape}" for s in (found, self.storage))
            error_msgs.append(f"{prefix}weight is {given}, the layer has {wanted}")
            return
        self.storage.take_(found.to(next(self.storage.buffers()).device))


class StoredLinear(Stored, nn.Linear):
    """y = x W^T + bias, with W (O, D) in a storage; `transposed` if it replaces a Conv1D, whose weight is (D, O)."""

    def __init__(
        self, storage: Storage, bias: Tensor | None = None, *, saved: bool = True, transposed: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = storage.shape
        self.storage, self.saved, self.transposed = storage, saved, transposed
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def of(
        cls, layer: nn.Linear | Conv1D, config: StorageConfig, name: str = "weight", store: StoreWeight = store_weight
    ) -> Self:
        """The same layer with its weight stored as `config` says; a Conv1D's (D, O) is transposed."""
        w = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        return cls.holding(store(w.contiguous(), config, name), layer)

    @classmethod
    def holding(cls, storage: Storage, layer: nn.Linear | Conv1D) -> Self:
        """The same layer over `storage` (O, D); the layer's own weight may be on the meta device."""
        return cls(storage, layer.bias, transposed=isinstance(layer, Conv1D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.storage.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, storage={type(self.storage).__name__}"


class StoredEmbedding(Stored, nn.Embedding):
    """Embedding with W (V, D) in a storage."""

    def __init__(
        self, storage: Storage, dtype: torch.dtype, padding_idx: int | None = None, scale: float = 1.0
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = storage.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.storage, self.saved, self.out_dtype, self.embed_scale = storage, True, dtype, scale
        self.register_parameter("weight", None)

    @classmethod
    def of(
        cls, layer: nn.Embedding, config: StorageConfig, name: str = "weight", store: StoreWeight = store_weight
    ) -> Self:
        """The same layer with its weight stored as `config` says."""
        return cls.holding(store(layer.weight, config, name), layer, name)

    @classmethod
    def holding(cls, storage: Storage, layer: nn.Embedding, name: str = "weight") -> Self:
        """The same layer over `storage`; the layer's own weight may be on the meta device."""
        if layer.max_norm is not None:
            raise TargetError(
                f"{name}: an embedding with max_norm changes its weight in forward, so it must stay dense"
            )
        scale = getattr(layer, "embed_scale", getattr(layer, "scalar_embed_scale", 1.0))
        return cls(storage, layer.weight.dtype, layer.padding_idx, float(scale))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as adapters see an embedding: (D, V)."""
        return self.storage.dense(dtype).T

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.storage.rows(ids, self.out_dtype)
        return rows if self.embed_scale == 1.0 else rows * torch.tensor(self.embed_scale, dtype=rows.dtype)

    def head(self, bias: Tensor | None = None) -> StoredLinear:
        """The output head tied to this embedding: it shares the storage and does not save it."""
        return StoredLinear(self.storage, bias, saved=False)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, storage={type(self.storage).__name__}"


def stored(
    layer: nn.Module, config: StorageConfig, name: str = "weight", store: StoreWeight = store_weight
) -> StoredLinear | StoredEmbedding:
    """The stored version of a linear layer, Conv1D or embedding.  Raises TargetError for any other module."""
    if isinstance(layer, nn.Linear | Conv1D):
        return StoredLinear.of(layer, config, name, store)
    if isinstance(layer, nn.Embedding):
        return StoredEmbedding.of(layer, config, name, store)
    raise TargetError(f"{name}: a {type(layer).__name__} has no weight that a storage supports")


def store_(model: nn.Module, config: StorageConfig, paths: Iterable[str], store: StoreWeight = store_weight) -> None:
    """Replace the modules at `paths` by stored ones; a head tied to a stored embedding shares its storage.

    store   creates each storage
    All layers are created before the first is replaced, so that an error leaves the model unchanged.
    """
    made: dict[str, nn.Module] = {}
    embeddings: dict[int, StoredEmbedding] = {}
    layers = sorted(((p, model.get_submodule(p)) for p in paths), key=lambda x: not isinstance(x[1], nn.Embedding))
    for path, layer in layers:
        tied = embeddings.get(id(getattr(layer, "weight", None)))
        if tied is not None and isinstance(layer, nn.Linear):
            made[path] = tied.head(layer.bias)
            continue
        made[path] = stored(layer, config, f"{path}.weight", store)
        if isinstance(layer, nn.Embedding) and isinstance(new := made[path], StoredEmbedding):
            embeddings[id(layer.weight)] = new
    for path, new in made.items():
        parent, _, leaf = path.rpartition(".")
        new.train(model.get_submodule(path).training)
        setattr(model.get_submodule(parent), leaf, new)
