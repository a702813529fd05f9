"""Full fine-tuning: learn a change of every number of the layer.

    y' = y + dW x + db        dW: (O, D)    db: (O,), where the layer has a bias    both at first 0

The base stays frozen and the change is kept apart, in float32, so full fine-tuning is saved, detached, folded and
compared like any other method.  It costs a second matrix product; normalization gains are not among the targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.methods.base import METHODS, Delta, FrozenLayer, Kind, MethodConfig, Role


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Full fine-tuning has no settings of its own."""

    method: ClassVar[str] = "full"


@METHODS.add("full")
class Full(Delta):
    """The full delta of one layer: w (O, D), and db (O,) where the layer has a bias."""

    Config = FullConfig
    roles: ClassVar[Mapping[str, Role]] = {"w": "full", "db": "bias"}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "embedding"})

    def __init__(self, layer: FrozenLayer, config: FullConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.kind, self.padding_idx, self.embed_scale = layer.kind, layer.padding_idx, layer.embed_scale
        self.w = nn.Parameter(torch.zeros(layer.out_features, layer.in_features))
        self.db = nn.Parameter(torch.zeros(layer.out_features)) if layer.has_bias else None
        self.to(layer.device)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Linear: x (..., D), y (..., O).  Embedding: x (...) token ids."""
        if self.kind == "embedding":
            return y + F.embedding(x, self.w.T, self.padding_idx).to(y.dtype) * self.embed_scale
        bias = None if self.db is None else self.db.to(y.dtype)
        return y + F.linear(x.to(y.dtype), self.w.to(y.dtype), bias)

    def fold(self, w: Tensor) -> Tensor:
        return w + self.w.to(w.dtype)

    def fold_bias(self, bias: Tensor) -> Tensor:
        return bias if self.db is None else bias + self.db.to(bias.dtype)

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: FullConfig) -> int:
        """O D, and O where the layer has a bias."""
        return layer.out_features * (layer.in_features + layer.has_bias)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"weight_delta": self.w}
        return tensors if self.db is None else {**tensors, "bias_delta": self.db}
