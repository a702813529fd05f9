"""Dynamic 8-bit quantization: 256 levels, dense near 0, relative to the block's largest magnitude.

Source: Dettmers et al. 2021, arXiv:2110.02861, section 1.3; the levels are computed as in bitsandbytes.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

DECADES = 7
"""Powers of 10 that the levels span."""
LEAST_ABSMAX = 1e-38
"""Smallest divisor of a block, as in bitsandbytes."""


class DynamicMap(NamedTuple):
    """Levels, and tables to find the nearest one."""

    levels: Tensor
    """(256,) float32, rising; level `zero` is 0."""
    bounds: Tensor
    """(255,) float32: midpoints of neighbors; the code of x is how many are below it."""
    lines: Tensor
    """(4, 16) float32, by decade of |x|: start, slope, offset, last level (csrc/dynamic.h)."""
    zero: int


@cache
def dynamic_map(signed: bool = True) -> DynamicMap:
    """0, 1, and for i = 0 ... 6 the midpoints of 2^i cells (unsigned: 2^(i + 1)) of [0.1, 1], times 10^(i - 6).

    Signed levels have both signs, except that -1 is missing.  Computed in float32, as in bitsandbytes.
    """
    values = [0.0, 1.0]
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1) if signed else (1,):
            values += (sign * 10 ** (i - 6) * means).tolist()
    levels = torch.tensor(sorted(values), dtype=torch.float32)
    bounds = (levels[:-1] + levels[1:]) / 2
    zero = 127 if signed else 0
    return DynamicMap(levels, bounds, _lines(levels[zero:], bounds[zero:], signed), zero)


def encode(blocks: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Blocks (B, n) float32 -> codes (B, n) uint8 of the nearest levels, the lower at a tie; absmax (B,)."""
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=LEAST_ABSMAX))[:, None]
    codes = torch.bucketize(scaled, dynamic_map(signed).bounds.to(blocks.device), out_int32=True)
    return codes.to(torch.uint8), absmax


def _lines(levels: Tensor, bounds: Tensor, signed: bool) -> Tensor:
    """`lines` for the levels >= 0: within a decade the code relative to that of 0 is floor(slope * |x| + offset), with
    |x| clamped to the decade's last level."""
    lines = torch.zeros(4, 16)
    lines[0] = torch.inf
    lines[2, 0] = 0.5  # decade 0 and the last hold one level each, half a code from any doubt
    first = 1
    for i in range(DECADES):
        cells = 2 ** (i + (not signed))
        last = first + cells - 1
        slope, offset = cells / (0.9 * 10.0 ** (i - 6)), first - cells / 9
        lines[:, i + 1] = torch.tensor([float(bounds[first - 1]), slope, offset, float(levels[last])])
        first = last + 1
    lines[:, DECADES + 1] = torch.tensor([float(bounds[first - 1]), 0.0, first + 0.5, 1.0])
    return lines
