"""(IA)^3: learn one factor per output of keys and values, and one per input of the feed-forward's last layer.

    y' = l * y           l: (O,)                       keys, values
    y' = W (l * x) + b   l: (D,)                       feed-forward

Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.  l starts at 1, so the layer is at first unchanged.
In the feed-forward the paper scales the last layer's input, so `before` changes that input.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.methods.base import METHODS, Delta, FrozenLayer, Kind, MethodConfig, Role
from veneer.settings import typed

FEEDFORWARD = ("down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "wo", "w2", "output.dense")
"""The last feed-forward layer of common models."""


@dataclass(frozen=True, kw_only=True)
class IA3Config(MethodConfig):
    """Settings of (IA)^3."""

    method: ClassVar[str] = "ia3"
    feedforward: tuple[str, ...] | str = FEEDFORWARD
    """Modules whose input is scaled, not their output: path endings, or one regular expression for whole paths."""

    def __post_init__(self) -> None:
        if isinstance(self.feedforward, str):
            try:
                re.compile(self.feedforward)
            except re.error as error:
                raise ConfigError(
                    f"ia3.feedforward {self.feedforward!r} is not a regular expression: {error}"
                ) from error

    def at(self, path: str) -> Self:
        return replace(self, feedforward=".*" if self.scales_input(path) else "")

    def scales_input(self, path: str) -> bool:
        """Whether the module at `path` has its input scaled."""
        if isinstance(self.feedforward, str):
            return bool(self.feedforward) and re.fullmatch(self.feedforward, path) is not None
        return any(path == name or path.endswith("." + name) for name in self.feedforward)


@METHODS.add("ia3")
class IA3(Delta):
    """The (IA)^3 delta of one layer: one parameter factor (O,), or (D,) where it scales the input."""

    Config = IA3Config
    roles: ClassVar[Mapping[str, Role]] = {"factor": "scale"}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv"})

    def __init__(self, layer: FrozenLayer, config: IA3Config, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.on_input, self.geometry = config.scales_input(""), layer.geometry
        self.factor = nn.Parameter(torch.ones(layer.in_features if self.on_input else layer.out_features))
        self.to(layer.device)

    def before(self, x: Tensor) -> Tensor:
        return x * self._shaped(x.dtype) if self.on_input else x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y (..., O), or (B, O, *space) of a convolution."""
        return y if self.on_input else y * self._shaped(y.dtype)

    def _shaped(self, dtype: torch.dtype) -> Tensor:
        space = len(self.geometry.kernel) if self.geometry else 0
        return self.factor.to(dtype).reshape(-1, *[1] * space)

    def fold(self, w: Tensor) -> Tensor:
        factor = self.factor.to(w.dtype)
        if not self.on_input:
            return w * factor.reshape(-1, *[1] * (w.dim() - 1))
        groups = self.geometry.groups if self.geometry else 1
        columns = factor.reshape(groups, 1, w.shape[1]).expand(groups, w.shape[0] // groups, w.shape[1])
        return w * columns.reshape(*w.shape[:2], *[1] * (w.dim() - 2))

    def fold_bias(self, bias: Tensor) -> Tensor:
        return bias if self.on_input else bias * self.factor.to(bias.dtype)

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: IA3Config) -> int:
        """O, or D where the input is scaled."""
        return layer.in_features if config.scales_input("") else layer.out_features

    def tensors(self) -> dict[str, Tensor]:
        space = [1] * len(self.geometry.kernel) if self.geometry else []
        row = self.on_input or bool(self.geometry)
        return {"ia3_l": self.factor.reshape(1, -1, *space) if row else self.factor.reshape(-1, 1)}

    @classmethod
    def to_peft(cls, config: IA3Config) -> dict[str, Any]:
        """`feedforward_modules` as one expression: PEFT wants a list of names to be among its `target_modules`."""
        given = config.feedforward
        names = given if isinstance(given, str) else rf"(.*\.)?({'|'.join(re.escape(name) for name in given)})"
        return {"peft_type": "IA3", "feedforward_modules": names, "init_ia3_weights": True}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> IA3Config | None:
        if fields.get("peft_type") != "IA3":
            return None
        given = fields.get("feedforward_modules") or ()
        return typed("method", "ia3", IA3Config, {"feedforward": given if isinstance(given, str) else tuple(given)})
