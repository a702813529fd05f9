"""BitFit: learn a change of the layer's bias, and nothing else.

    y' = y + c        c: (O,), at first 0

Source: Ben Zaken et al. 2022, arXiv:2106.10199.  There every bias of the model is trained; here it is the biases of the
target layers: name the norms among the targets to have theirs too.  A layer without bias (LLaMA's) is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.methods.base import METHODS, Delta, FrozenLayer, Kind, MethodConfig, Role


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """BitFit has no settings."""

    method: ClassVar[str] = "bitfit"


@METHODS.add("bitfit")
class BitFit(Delta):
    """The BitFit delta of one layer: one parameter c (O,)."""

    Config = BitFitConfig
    roles: ClassVar[Mapping[str, Role]] = {"c": "bias"}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "norm"})

    def __init__(self, layer: FrozenLayer, config: BitFitConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.space = len(layer.geometry.kernel) if layer.geometry else 0
        self.c = nn.Parameter(torch.zeros(layer.out_features))
        self.to(layer.device)

    @classmethod
    def refuse_layer(cls, layer: FrozenLayer, config: BitFitConfig) -> None:
        if not layer.has_bias:
            raise ConfigError("this layer has no bias for bitfit to train; exclude it, or take another method")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y (..., O), or (B, O, *space) of a convolution."""
        return y + self.c.to(y.dtype).reshape(-1, *[1] * self.space)

    def fold(self, w: Tensor) -> Tensor:
        """The weight stays; the change is in `fold_bias`."""
        return w

    def fold_bias(self, bias: Tensor) -> Tensor:
        return bias + self.c.to(bias.dtype)

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: BitFitConfig) -> int:
        """O."""
        return layer.out_features

    def tensors(self) -> dict[str, Tensor]:
        return {"bias_delta": self.c}
