"""Uniform: A ~ U(-1/sqrt(D), 1/sqrt(D)), B = 0, as in LoRA's original code (Kaiming with a = sqrt(5))."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from veneer.methods.init.base import INITS, DrawnInit


@INITS.add("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(DrawnInit):
    """Has no settings."""

    name: ClassVar[str] = "uniform"

    def draw(self, shape: torch.Size, rank: int, rng: torch.Generator) -> Tensor:
        return uniform(shape, prod(shape[1:]), rng)


def uniform(shape: torch.Size, fan_in: int, rng: torch.Generator) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=rng)
