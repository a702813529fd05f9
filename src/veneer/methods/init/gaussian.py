"""Gaussian: A ~ N(0, 1/R^2), B = 0, as in LoRA's paper; the standard deviation is PEFT's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.methods.init.base import INITS, DrawnInit


@INITS.add("gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian(DrawnInit):
    """Has no settings."""

    name: ClassVar[str] = "gaussian"
    in_peft: ClassVar[str | bool] = "gaussian"

    def draw(self, shape: torch.Size, rank: int, rng: torch.Generator) -> Tensor:
        return torch.empty(shape).normal_(0.0, 1 / rank, generator=rng)
