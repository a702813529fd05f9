"""Check the arguments of every op (shapes, dtypes, contiguity, values) before a kernel touches memory."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from veneer.errors import InputError
from veneer.kernels.reference import Packed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of the dtypes in csrc/veneer.h."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes (weights per absmax) of the format."""


def require(fits: bool, message: str) -> None:
    """Raise InputError unless `fits`."""
    if not fits:
        raise InputError(message)


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check one argument's shape, dtype and contiguity."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise InputError(f"{op}: {name} is {tuple(tensor.shape)} {tensor.dtype}, should be {shape} {dtype}")
    if not tensor.is_contiguous():
        raise InputError(f"{op}: {name} is not contiguous; call .contiguous() first")


def check_weight(op: str, w: Packed, rows: int, cols: int) -> None:
    """Check all tensors of a quantized W (O, D)."""
    require(w.block in BLOCKS, f"{op}: block is {w.block}, should be one of {', '.join(map(str, BLOCKS))}")
    n = rows * cols
    blocks = -(-n // w.block)
    if w.codes.dtype != torch.uint8 or w.codes.numel() != (n + 1) // 2 or not w.codes.is_contiguous():
        raise InputError(
            f"{op}: codes has {w.codes.numel()} elements of {w.codes.dtype}, "
            f"a weight of {rows} x {cols} has {(n + 1) // 2} bytes of torch.uint8, contiguous"
        )
    check_tensor(op, "levels", w.levels, (16,), torch.float32)
    if w.nested_absmax is None or w.nested_levels is None:
        require(w.nested_absmax is w.nested_levels, f"{op}: nested_absmax and nested_levels go together")
        return check_tensor(op, "absmax", w.absmax, (blocks,), torch.float32)
    require(w.nested_block > 0, f"{op}: nested_block is {w.nested_block}, should be at least 1")
    check_tensor(op, "absmax", w.absmax, (blocks,), torch.uint8)
    check_tensor(op, "nested_absmax", w.nested_absmax, (-(-blocks // w.nested_block),), torch.float32)
    return check_tensor(op, "nested_levels", w.nested_levels, (256,), torch.float32)


def check_rows(op: str, name: str, x: Tensor) -> None:
    """Check the dense operand of a product."""
    require(x.dim() >= 1 and x.shape[-1] > 0, f"{op}: {name} has shape {tuple(x.shape)}, should be (..., features)")
    require(
        x.dtype in (torch.float32, torch.bfloat16),
        f"{op}: {name} is {x.dtype}, should be torch.float32 or torch.bfloat16",
    )


def check_segments(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, starts: Tensor, slots: Tensor) -> None:
    """Check shapes and dtypes of a batch of adapters."""
    op = "lora_segments"
    check_rows(op, "x", x)
    require(x.dim() == 2 and a.dim() == 3 and b.dim() == 3, f"{op}: x is (N, D), a (S, R, D), b (S, O, R)")
    s, r = a.shape[:2]
    check_tensor(op, "a", a, (s, r, x.shape[1]), torch.float32)
    check_tensor(op, "b", b, (s, b.shape[1], r), torch.float32)
    check_tensor(op, "scale", scale, (s,), torch.float32)
    check_tensor(op, "slots", slots, (slots.numel(),), torch.int64)
    check_tensor(op, "starts", starts, (slots.numel() + 1,), torch.int64)


def check_segment_values(n: int, adapters: int, starts: Sequence[int], slots: Sequence[int]) -> None:
    """Check that segments cover the rows in order and that their slots exist."""
    rising = all(i <= j for i, j in pairwise(starts))
    require(
        bool(starts) and starts[0] == 0 and starts[-1] == n and rising,
        f"lora_segments: starts should rise from 0 to {n} rows, got {list(starts)}",
    )
    if wrong := [s for s in slots if not -1 <= s < adapters]:
        raise IndexError(f"lora_segments: slots {wrong} are outside [-1, {adapters})")


def check_quantize(x: Tensor, bounds: Tensor, order: Tensor, block: int) -> None:
    op = "quantize_4bit"
    require(block in BLOCKS, f"{op}: block is {block}, should be one of {', '.join(map(str, BLOCKS))}")
    require(x.dtype in DTYPES, f"{op}: x is {x.dtype}, should be one of {', '.join(map(str, DTYPES))}")
    require(x.numel() > 0, f"{op}: x is empty")
    check_tensor(op, "bounds", bounds, (15,), torch.float32)
    check_tensor(op, "order", order, (16,), torch.uint8)


def check_finite(x: Tensor, begin: int = 0) -> None:
    """Raise InputError, with its position, for the first NaN or infinity from flat position `begin` on."""
    flat = x.reshape(-1)[begin:]
    wrong = (~flat.isfinite()).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise InputError(
            f"quantize_4bit: the weight holds {float(flat[at])} at position {begin + at} (flattened); "
            "only finite numbers can be quantized"
        )


def check_absmax(op: str, values: Tensor, dtype: torch.dtype, block: int) -> None:
    require(values.numel() > 0 and block > 0, f"{op}: {values.numel()} values in blocks of {block}")
    check_tensor(op, "values", values, (values.numel(),), dtype)


def check_dequantize(w: Packed, shape: Sequence[int], dtype: torch.dtype) -> int:
    op = "dequantize_4bit"
    require(dtype in DTYPES, f"{op}: dtype is {dtype}, should be one of {', '.join(map(str, DTYPES))}")
    n = math.prod(shape)
    require(n > 0, f"{op}: shape is {tuple(shape)}")
    check_weight(op, w, 1, n)
    return n
