"""DoRA: learn a weight's direction by LoRA and its magnitude by one number per output.

    y' = (m / n) (W + s B A) x + bias        n = ||W + s B A||, one norm (O,) per output, a constant in the gradient
                                             m: (O,), at first n

Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3 (the norm without gradient).
Departs from it: with dropout only the low-rank path sees the dropped input; the authors' code drops it for W too.

The norm is taken at every forward pass, from W A^T instead of a dense B A: O D R multiply-adds and one dense W.
Embedding: the norm is over the words, one per column of the table. Convolution: over channels and kernel.

After restarts the past is c (W + s B A) with c (O,) the product of all cycles' m / n: cycles multiply rows and add a
low-rank term in turn, so a cycle's B, divided by the c before it, joins the others.  All cycles together are therefore
one DoRA of rank n R, and saved as one; its m is the last cycle's, with c's sign.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.methods.base import METHODS, FrozenLayer, MethodConfig, Role
from veneer.methods.init.base import INITS
from veneer.methods.lora import LoRA, LoRAConfig

KEY = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """Settings of DoRA: those of LoRA."""

    method: ClassVar[str] = "dora"

    @classmethod
    def inits(cls) -> list[str]:
        """The drawn ones."""
        return [name for name in INITS if INITS[name].drawn]


@METHODS.add("dora")
class DoRA(LoRA):
    """The DoRA delta of one layer: LoRA's parameters a and b, and m (O,)."""

    Config = DoRAConfig
    roles: ClassVar[Mapping[str, Role]] = {**LoRA.roles, "m": "scale"}

    def __init__(self, layer: FrozenLayer, config: DoRAConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.m = nn.Parameter(self._norm(layer.weight()))

    @torch.no_grad()
    def restart_(self, rng: torch.Generator) -> None:
        super().restart_(rng)
        if "m" in self._parameters:  # not yet when LoRA's __init__ calls this
            self.m.copy_(self._norm(self.weight()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """As LoRA's, where y is the frozen layer's output with its bias."""
        bias = self.layer.bias
        plain = y if bias is None else y - self._per_output(bias().to(y.dtype))
        before = plain
        if self.past and not self.past_in_weight:
            past = self._per_output(self.past["ratio"].to(y.dtype))
            plain = past * self._added(x, plain, self.past["a"], self.past["b"])
        ratio = self._per_output((self.m / self._norm(self.weight())).to(y.dtype))
        x = x if self.kind == "embedding" else self.dropout(x.to(y.dtype))
        low_rank = self._added(x, torch.zeros_like(y), self.a, self.b)
        return y + (plain - before) + (ratio - 1) * plain + ratio * low_rank

    def _per_output(self, v: Tensor) -> Tensor:
        """v (O,) in a shape that multiplies an output; a convolution's channels come before its spatial dimensions."""
        return v.reshape(-1, *[1] * (self.a.dim() - 2)) if self.kind == "conv" else v

    @torch.no_grad()
    def _norm(self, w: Tensor) -> Tensor:
        """||W + s B A|| (O,) of a weight (O, D, *kernel)."""
        w = w.to(self.a.dtype)
        if self.kind == "conv":
            norm: Tensor = torch.linalg.vector_norm(self._folded(w, self.a, self.b).flatten(1), dim=1)
            return norm
        a, b = self.a, self.b
        squares = w.square().sum(1) + 2 * self.scale * ((w @ a.T) * b).sum(1)
        return (squares + self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)).clamp_min(torch.finfo(w.dtype).tiny).sqrt()

    def fold(self, w: Tensor) -> Tensor:
        w = self.fold_past(w)
        return _times_rows(self._folded(w, self.a, self.b), self.m / self._norm(w))

    def fold_past(self, w: Tensor) -> Tensor:
        return _times_rows(super().fold_past(w), self.past["ratio"]) if self.past else w

    def _change(self) -> tuple[Tensor, Tensor]:
        if not self.past:
            return self.a, self.b
        rows = self.b.shape[0]
        return self.a, self.b / self.past["ratio"].reshape(rows, 1)

    @torch.no_grad()
    def remember_(self) -> None:
        ratio = self.m / self._norm(self.weight())
        before = self.past.get("ratio", torch.ones_like(ratio))
        super().remember_()
        self.past["ratio"] = before * ratio

    def factors(self) -> None:
        """None: the magnitude changes every row of the weight, so the update has no small rank."""

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: LoRAConfig) -> int:
        """LoRA's and O."""
        return super().n_params(layer, config) + layer.out_features

    @classmethod
    def n_past(cls, layer: FrozenLayer, config: LoRAConfig, cycles: int) -> int:
        """LoRA's and c."""
        return super().n_past(layer, config, cycles) + layer.out_features

    def tensors(self) -> dict[str, Tensor]:
        m = self.m * self.past["ratio"].sign() if self.past else self.m
        m = m.reshape(1, -1, *[1] * (self.a.dim() - 2)) if self.kind == "conv" else m
        return {**super().tensors(), KEY: m}

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_(tensors)
        self.m.copy_(tensors[KEY].reshape(-1))

    @classmethod
    def to_peft(cls, config: LoRAConfig) -> dict[str, Any]:
        return {**super().to_peft(config), "use_dora": True}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> MethodConfig | None:
        return super().from_peft({**fields, "use_dora": False}) if fields.get("use_dora") else None


def _times_rows(w: Tensor, by: Tensor) -> Tensor:
    """W (O, D, *kernel) with each output's row multiplied by its number of `by` (O,)."""
    return w * by.to(w.dtype).reshape(-1, *[1] * (w.dim() - 1))
