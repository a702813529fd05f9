"""FP4: a sign, two bits of exponent and one of mantissa, in bitsandbytes' own order of codes.

The low three bits of a code are 0, 1/16, 8, 12, 4, 6, 2, 3 twelfths; the high bit is the sign. Code 8 is a second zero.
Source: bitsandbytes 0.50 (`get_4bit_type("fp4")`); Dettmers et al. 2023, arXiv:2305.14314, compares NF4 with it.
Identical to its CPU version: small positive numbers get code 8, small negative ones code 0.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from veneer.storage.base import STORAGES
from veneer.storage.fourbit import FourBit, FourBitConfig

TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""By the low three bits of a code."""
ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
"""Codes in the order of rising levels."""


@dataclass(frozen=True, kw_only=True)
class FP4Config(FourBitConfig):
    """Settings of FP4."""

    storage = "fp4"


@STORAGES.add("fp4")
class FP4(FourBit):
    """W in FP4."""

    Config = FP4Config
    quant_type = "fp4"

    @classmethod
    @cache
    def tables(cls) -> tuple[Tensor, Tensor, Tensor]:
        """Levels by code, the midpoints between them in rising order, and codes in that order."""
        positive = torch.tensor([t / 12.0 for t in TWELFTHS], dtype=torch.float32)
        levels = torch.cat([positive, 0.0 - positive])
        order = torch.tensor(ORDER, dtype=torch.uint8)
        rising = levels[order.int()]
        return levels, (rising[:-1] + rising[1:]) / 2, order
