"""NF4: 16 levels at quantiles of a normal distribution, 8 above zero, 7 below, and zero.

    up   = Q(linspace(e, 1/2, 9)) without the last       down = -Q(linspace(e, 1/2, 8)) without the last
    levels = sorted(down, 0, up) / max                   e = 0.9677083, Q the standard normal quantile

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. The table is copied from the authors' code, which uses a
float32 linspace. Differs from the paper: its equation 4 does not give these levels; the authors' code does.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from veneer.storage.base import STORAGES
from veneer.storage.fourbit import FourBit, FourBitConfig

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""By code, rising."""


@dataclass(frozen=True, kw_only=True)
class NF4Config(FourBitConfig):
    """Settings of NF4."""

    storage = "nf4"


@STORAGES.add("nf4")
class NF4(FourBit):
    """W in NF4."""

    Config = NF4Config
    quant_type = "nf4"

    @classmethod
    @cache
    def tables(cls) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, the midpoints between them, and codes in the order of the levels."""
        levels = torch.tensor(LEVELS, dtype=torch.float32)
        return levels, (levels[:-1] + levels[1:]) / 2, torch.arange(16, dtype=torch.uint8)
