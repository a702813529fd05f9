"""Quantized weights for the tests of kernels, made by torch alone."""

import torch
from torch import Tensor

from tests.oracles import fourbit as oracle
from veneer.kernels.reference import Packed

LEVELS = {"nf4": oracle.nf4_levels(), "fp4": oracle.fp4_levels()}


def tables(kind: str = "nf4") -> tuple[Tensor, Tensor, Tensor]:
    """levels, bounds, order for the ops, from the oracle's levels."""
    levels = torch.tensor(LEVELS[kind], dtype=torch.float32)
    order = torch.tensor(sorted(range(16), key=lambda c: (LEVELS[kind][c], c)), dtype=torch.uint8)
    rising = levels[order.int()]
    return levels, (rising[:-1] + rising[1:]) / 2, order


def packed(rows: int, cols: int, block: int = 64, nested: bool = False, seed: int = 0) -> Packed:
    """A random weight (rows, cols): codes and absmax drawn, not quantized."""
    rng = torch.Generator().manual_seed(seed)
    n = rows * cols
    blocks = -(-n // block)
    codes = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=rng)
    levels = tables()[0]
    if not nested:
        return Packed(codes, torch.rand(blocks, generator=rng) + 0.1, levels, None, None, 0.0, 256, block)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=rng)
    scales = torch.rand(-(-blocks // 256), generator=rng) * 0.4
    nested_levels = torch.tensor(oracle.dynamic_map(), dtype=torch.float32)
    return Packed(codes, absmax, levels, scales, nested_levels, 0.625, 256, block)


def dense(w: Packed, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """W by the oracle, rounded to dtype."""
    absmax = w.absmax.tolist()
    if w.nested_absmax is not None and w.nested_levels is not None:
        absmax = oracle.decode_absmax(absmax, w.nested_absmax, w.nested_levels, w.offset, w.nested_block)
    flat = oracle.dequantize(w.codes.tolist(), absmax, w.levels, w.block, rows * cols)
    return torch.from_numpy(flat).to(dtype).view(rows, cols)
