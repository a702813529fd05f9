"""Bottleneck adapters: a small network of two layers after, or beside, a part of the model.

    y' = y + s (U f(V h + v) + u)        V: (M, H)    U: (O, M)    f a nonlinearity    h = y after, h = x beside

    houlsby     after the last linear layer of the attention and of the feed-forward block (both as targets); GELU
    pfeiffer    after the feed-forward block's last linear layer only; ReLU
    parallel    beside the feed-forward block (the block itself as target, such as `mlp`); ReLU

Source: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; parallel: He et al. 2022,
arXiv:2110.04366, where s is 4.  M is the paper's m, r or d_bottleneck.
Departs from them: U starts at 0, so a new delta changes nothing at all (theirs is nearly the identity); no layer norm
is trained, and pfeiffer's own order around a norm that follows the residual sum (BERT's) is not reproduced.
A nonlinearity cannot be folded into a weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import ConfigError, TargetError
from veneer.methods.base import METHODS, Delta, FrozenLayer, Kind, MethodConfig, Role

Variant = Literal["houlsby", "pfeiffer", "parallel"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_OWN_ACTIVATION: dict[Variant, Activation] = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "relu"}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodConfig):
    """Settings of bottleneck adapters."""

    method: ClassVar[str] = "bottleneck"
    variant: Variant = "houlsby"
    """Where it sits and, unless `activation` says otherwise, its nonlinearity; the targets have to name the place."""
    size: int = 16
    """M, the width of the bottleneck, at least 1."""
    activation: Activation | None = None
    """f; None for the variant's own."""
    scale: float = 1.0
    """s (no unit); for parallel its paper takes 4."""
    dropout: float = 0.0
    """Share of h set to 0 in training, in [0, 1)."""

    def __post_init__(self) -> None:
        problems = []
        if self.variant not in get_args(Variant):
            problems.append(f"variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")
        if self.activation is not None and self.activation not in get_args(Activation):
            problems.append(f"activation must be one of {', '.join(get_args(Activation))}, got {self.activation!r}")
        if self.size < 1:
            problems.append(f"size must be at least 1, got {self.size}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if problems:
            raise ConfigError("\n".join(f"bottleneck.{p}" for p in problems))


@METHODS.add("bottleneck")
class Bottleneck(Delta):
    """The bottleneck of one place: down (M, H), down_bias (M,), up (O, M), up_bias (O,)."""

    Config = BottleneckConfig
    roles: ClassVar[Mapping[str, Role]] = {"down": "in", "down_bias": "bias", "up": "out", "up_bias": "bias"}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "module"})

    def __init__(self, layer: FrozenLayer, config: BottleneckConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        width, o = _width(layer, config), layer.out_features
        self.beside, self.scale = config.variant == "parallel", config.scale
        self.function = _FUNCTIONS[config.activation or _OWN_ACTIVATION[config.variant]]
        self.dropout = nn.Dropout(config.dropout)
        bound = width**-0.5
        self.down = nn.Parameter(torch.empty(config.size, width).uniform_(-bound, bound, generator=rng))
        self.down_bias = nn.Parameter(torch.zeros(config.size))
        self.up = nn.Parameter(torch.zeros(o, config.size))
        self.up_bias = nn.Parameter(torch.zeros(o))
        self.to(layer.device)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., D), y (..., O)."""
        if not isinstance(y, Tensor):
            raise TargetError(
                f"bottleneck needs a target that returns one tensor, but a target returned a {type(y).__name__} "
                "(attention blocks do); name the block's last linear layer in its place"
            )
        h = self.dropout((x if self.beside else y).to(y.dtype))
        z = self.function(F.linear(h, self.down.to(y.dtype), self.down_bias.to(y.dtype)))
        return y + F.linear(z, self.up.to(y.dtype), self.up_bias.to(y.dtype)) * self.scale

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: BottleneckConfig) -> int:
        """M (H + O) + M + O."""
        return config.size * (_width(layer, config) + layer.out_features + 1) + layer.out_features

    def tensors(self) -> dict[str, Tensor]:
        return {
            "adapter_down.weight": self.down,
            "adapter_down.bias": self.down_bias,
            "adapter_up.weight": self.up,
            "adapter_up.bias": self.up_bias,
        }

    @classmethod
    def to_peft(cls, config: BottleneckConfig) -> dict[str, Any]:
        return super().to_peft(config) | {"activation": config.activation or _OWN_ACTIVATION[config.variant]}


def _width(layer: FrozenLayer, config: BottleneckConfig) -> int:
    """H: the layer's outputs, or for parallel its inputs."""
    return layer.in_features if config.variant == "parallel" else layer.out_features
