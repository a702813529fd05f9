"""Reference implementation of every kernel in plain torch, for any device.  The C library is tested against it.

Letters: N rows of x, D in, O out, G weights per block, R rank, S adapters.
A weight W (O, D) is stored as 4-bit codes, two to a byte with the earlier weight in the HIGH nibble, and one absmax per
G consecutive weights of the flattened W; with double quantization each absmax is a byte (QLoRA, arXiv:2305.14314).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.dynamic_quant import LEAST_ABSMAX, encode

PANEL = 1 << 22
"""Weights dequantized at a time in a matrix product."""


class Packed(NamedTuple):
    """One quantized weight, as the ops take it."""

    codes: Tensor
    """((O * D + 1) // 2,) uint8, in any shape."""
    absmax: Tensor
    """(ceil(O * D / G),) float32, or uint8 codes if double-quantized."""
    levels: Tensor
    """(16,) float32: the value of each code, relative to absmax."""
    nested_absmax: Tensor | None
    """(ceil(blocks / nested_block),) float32."""
    nested_levels: Tensor | None
    """(256,) float32, rising."""
    offset: float
    """Mean of the absmax, subtracted before they were quantized."""
    nested_block: int
    """Blocks per nested absmax."""
    block: int
    """G."""


def quantize(x: Tensor, bounds: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x (...) -> codes ((n + 1) // 2,) uint8, absmax (ceil(n / G),) float32.

    bounds (15,) rising: v has code order[i] if i bounds are below it.  A full block is multiplied by 1 / absmax; a
    shorter last block is divided by an absmax of at least 1e-38.  Bit-identical to bitsandbytes.
    """
    flat = x.reshape(-1).float()
    whole = flat.numel() // block * block
    blocks = flat[:whole].view(-1, block)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=LEAST_ABSMAX))[:, None]).reshape(-1)
    if whole < flat.numel():
        last = flat[whole:].abs().amax().clamp(min=LEAST_ABSMAX)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, flat[whole:] / last])
    codes = order[torch.bucketize(scaled.clamp(-1, 1), bounds, out_int32=True)]
    if codes.numel() % 2:
        codes = torch.cat([codes, order[torch.bucketize(codes.new_zeros(1, dtype=torch.float32), bounds)]])
    return (codes[::2] << 4) | codes[1::2], absmax


def quantize_absmax(centered: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """absmax minus its mean (n,) -> uint8 codes (n,), nested absmax (ceil(n / block),).

    Each code is that of the nearest level of the dynamic map, the lower at a tie; a block of zeros gets code 0.
    """
    n = centered.numel()
    codes, nested = encode(F.pad(centered, (0, -n % block)).view(-1, block))
    codes[nested == 0] = 0
    return codes.reshape(-1)[:n], nested


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, levels: Tensor, offset: float, block: int) -> Tensor:
    """uint8 codes (n,) -> absmax (n,) float32: level * nested absmax + offset, rounded after each operation."""
    spread = nested_absmax.repeat_interleave(block)[: codes.numel()]
    return levels[codes.reshape(-1).int()] * spread + offset


def plain_absmax(w: Packed) -> Tensor:
    """The float32 absmax of every block."""
    if w.nested_absmax is None or w.nested_levels is None:
        return w.absmax
    return dequantize_absmax(w.absmax, w.nested_absmax, w.nested_levels, w.offset, w.nested_block)


def dequantize(w: Packed, n: int, dtype: torch.dtype) -> Tensor:
    """The first n weights of the flattened W: level * absmax in float32, then rounded to dtype."""
    codes = w.codes.reshape(-1).view(torch.uint8)
    both = torch.stack([codes >> 4, codes & 15], 1).reshape(-1)[:n]
    values = F.pad(w.levels[both.int()], (0, -n % w.block)).view(-1, w.block)
    return (values * plain_absmax(w)[:, None]).reshape(-1)[:n].to(dtype)


Unpack = Callable[[Packed, int, torch.dtype], Tensor]


def panels(w: Packed, rows: int, cols: int) -> list[tuple[int, int, Packed]]:
    """Split W into ranges of rows that start at a block and a byte: (first, last, their part of W)."""
    absmax = plain_absmax(w)
    codes = w.codes.reshape(-1).view(torch.uint8)
    unit = math.lcm(2, w.block) // math.gcd(math.lcm(2, w.block), cols)
    step = max(PANEL // (unit * cols), 1) * unit
    cut = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        begin, end = first * cols, last * cols
        own = absmax[begin // w.block : -(-end // w.block)]
        part = w._replace(codes=codes[begin // 2 : (end + 1) // 2], absmax=own, nested_absmax=None, nested_levels=None)
        cut.append((first, last, part))
    return cut


def matmul(x: Tensor, w: Packed, rows: int, unpack: Unpack = dequantize) -> Tensor:
    """y (N, O) = x (N, D) W^T, with W rounded to x's dtype; dequantizes a panel of W at a time."""
    cols = x.shape[1]
    y = x.new_empty(x.shape[0], rows)
    for first, last, part in panels(w, rows, cols):
        n = (last - first) * cols
        y[:, first:last] = F.linear(x, unpack(part, n, x.dtype).view(last - first, cols))
    return y


def matmul_backward(dy: Tensor, w: Packed, cols: int, unpack: Unpack = dequantize) -> Tensor:
    """dx (N, D) = dy (N, O) W, with W rounded to dy's dtype; panels are summed in float32."""
    rows = dy.shape[1]
    cut = panels(w, rows, cols)
    dx = torch.zeros(dy.shape[0], cols, dtype=torch.float32, device=dy.device)
    for first, last, part in cut:
        dense = unpack(part, (last - first) * cols, dy.dtype).view(last - first, cols)
        product = dy[:, first:last] @ dense
        if len(cut) == 1:
            return product
        dx += product
    return dx.to(dy.dtype)


def lora_segments(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
    """Apply each row's own adapter: y[n] = scale[s] * B[s] A[s] x[n] for s = slots[i], n in [starts[i], starts[i + 1]).

    x (N, D) f32 | bf16; a (S, R, D), b (S, O, R), scale (S,) float32; starts (segments + 1,), slots (segments,) int64.
    Returns (N, O) in x's dtype, exactly 0 where the slot is -1.  Source: Punica, arXiv:2310.18547.
    """
    parts = [x.new_zeros(0, b.shape[1])]
    for (first, last), slot in zip(pairwise(starts.tolist()), slots.tolist(), strict=True):
        t = F.linear(x[first:last].float(), a[slot]) * scale[slot] if slot >= 0 else None
        parts.append(x.new_zeros(last - first, b.shape[1]) if t is None else F.linear(t, b[slot]).to(x.dtype))
    return torch.cat(parts)
