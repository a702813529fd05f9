"""PiSSA: LoRA that starts from the weight's principal singular values instead of from zero.

    y' = y + s (B A - B0 A0) x        s B0 A0 = the best rank-R approximation of W        A, B start at A0, B0

The paper trains A and B beside a changed base, W - s B0 A0; here the base stays as it is and the fixed copies A0, B0
are subtracted, which is the same function.  Saved as a LoRA of rank 2 R of the unchanged base, [A; A0] and [B, -B0],
which every LoRA reader loads; read again it is that LoRA.

Source: Meng et al. 2024, arXiv:2404.02948, eq. 2-5; the form on disk: appendix C there ("to LoRA").
Departs from it: dropout drops what A0 sees too, so that a new delta changes nothing while training either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base import METHODS, FrozenLayer, Kind
from veneer.methods.lora import LoRA, LoRAConfig
from veneer.methods.svd import top_svd


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(LoRAConfig):
    """Settings of PiSSA: those of LoRA but for `init`."""

    method: ClassVar[str] = "pissa"
    iterations: int = 0
    """Subspace iterations of a randomized decomposition, 4 to 16 for large layers; 0: the exact one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "uniform":
            raise ConfigError(f"pissa starts from the weight, so it has no init, got {self.init!r}")
        if self.iterations < 0:
            raise ConfigError(f"pissa.iterations must be at least 0, got {self.iterations}")


@METHODS.add("pissa")
class PiSSA(LoRA):
    """The PiSSA delta of one linear layer: LoRA's a and b; their fixed first values a0 and b0 are no parameters."""

    Config = PiSSAConfig
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    config: PiSSAConfig
    a0: Tensor
    b0: Tensor

    def __init__(self, layer: FrozenLayer, config: PiSSAConfig, rng: torch.Generator) -> None:
        self.layer = layer
        super().__init__(layer, config, rng)

    @classmethod
    def refuse_layer(cls, layer: FrozenLayer, config: LoRAConfig) -> None:
        narrow = min(layer.in_features, layer.out_features)
        if config.rank > narrow:
            raise ConfigError(f"pissa.rank {config.rank} is above {narrow}, the most singular values this layer has")

    @torch.no_grad()
    def restart_(self, rng: torch.Generator) -> None:
        """Start from the principal values of the weight as it is now, finished cycles and all."""
        w = self.layer.weight() if self.past_in_weight else self.fold_past(self.layer.weight())
        a, b = principal(w, self.config.rank, self.scale, self.config.iterations, rng)
        self.a.copy_(a)
        self.b.copy_(b)
        self.register_buffer("a0", self.a.detach().clone())
        self.register_buffer("b0", self.b.detach().clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., D), y (..., O)."""
        if self.past and not self.past_in_weight:
            y = self._added(x, y, self.past["a"], self.past["b"])
        x = self.dropout(x.to(y.dtype))
        now, first = (
            F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in ((self.a, self.b), (self.a0, self.b0))
        )
        return y + (now - first) * self.scale

    def fold(self, w: Tensor) -> Tensor:
        w = self.fold_past(w)
        a, b, a0, b0 = (t.to(w.dtype) for t in (self.a, self.b, self.a0, self.b0))
        return w + (b @ a - b0 @ a0) * self.scale

    def _change(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], dim=1)

    @classmethod
    def n_past(cls, layer: FrozenLayer, config: LoRAConfig, cycles: int) -> int:
        """A, A0, B and B0 of each cycle."""
        return 2 * super().n_past(layer, config, cycles)

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a saved delta back to go on with its training."""
        self.check(tensors)
        a, b, r = tensors["lora_A.weight"], tensors["lora_B.weight"], self.config.rank
        for own, saved in ((self.a, a[:r]), (self.a0, a[r:]), (self.b, b[:, :r]), (self.b0, -b[:, r:])):
            own.copy_(saved)

    @classmethod
    def to_peft(cls, config: LoRAConfig) -> dict[str, Any]:
        """LoRA of twice the rank and the same scale."""
        more = sqrt(2) if config.rank_stabilized else 2
        return {
            **super().to_peft(config),
            "r": 2 * config.rank,
            "lora_alpha": more * config.alpha,
            "rank_pattern": {k: 2 * r for k, r in config.rank_pattern.items()},
            "alpha_pattern": {k: more * alpha for k, alpha in config.alpha_pattern.items()},
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> None:
        """None: a saved PiSSA adapter is a LoRA adapter."""


def principal(w: Tensor, rank: int, scale: float, iterations: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (R, D) and B (O, R) of W (O, D) with scale B A its best rank-R approximation, the values shared evenly."""
    u, values, vt = top_svd(w, rank, iterations, rng)
    root = (values / abs(scale)).sqrt()
    return root[:, None] * vt, u * (root if scale > 0 else -root)
