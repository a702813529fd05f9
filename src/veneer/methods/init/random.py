"""Random: A and B drawn uniformly, so a new delta changes the model at once; for tests and measurements."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.methods.init.base import INITS
from veneer.methods.init.uniform import Uniform, uniform


@INITS.add("random")
@dataclass(frozen=True, kw_only=True)
class Random(Uniform):
    """Has no settings."""

    name: ClassVar[str] = "random"
    no_change: ClassVar[bool] = False
    in_peft: ClassVar[str | bool] = False

    def other(self, shape: torch.Size, rank: int, rng: torch.Generator) -> Tensor:
        return uniform(shape, rank, rng)
