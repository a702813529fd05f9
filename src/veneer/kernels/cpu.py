"""The ops on a CPU: the C library if it is available and supports the shape, else the reference in torch.

The callers have checked the arguments (checks.py).
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from veneer.errors import VeneerError
from veneer.kernels import checks, native, reference
from veneer.kernels.checks import DTYPES
from veneer.kernels.dynamic_quant import DynamicMap, dynamic_map
from veneer.kernels.reference import Packed

FEW = 64
"""Rows up to which LoRA segments run in the C library, row by row; above, torch's matrix products are faster."""
MISALIGNED = "a tensor's address is not a multiple of its element size; pass a .clone() of it"
FAILURES = {-1: "this machine lacks the instruction set", -2: MISALIGNED, -3: "out of memory for scratch buffers"}


def done(op: str, code: int) -> None:
    """Raise VeneerError if the C library returned an error code."""
    if code:
        raise VeneerError(f"{op}: the C library failed: {FAILURES.get(code, code)}")


def as_struct(w: Packed, rows: int, cols: int) -> Any:
    """Pointer to a `veneer_weight`; the tensors must outlive its use."""
    absmax = (w.absmax, None) if w.nested_absmax is None or w.nested_levels is None else (None, w.absmax)
    tensors = (w.codes, *absmax, w.nested_absmax, w.nested_levels, w.levels)
    where = (None if t is None else t.data_ptr() for t in tensors)
    return ctypes.byref(native.Weight(*where, w.offset, w.nested_block, rows, cols, w.block))


def map8(table: DynamicMap) -> native.Map8:
    """A `veneer_map8`; the table must outlive it."""
    return native.Map8(table.levels.data_ptr(), table.bounds.data_ptr(), table.lines.data_ptr())


def quantize(x: Tensor, bounds: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    found = native.library()
    if found is None:
        checks.check_finite(x)
        return reference.quantize(x, bounds, order, block)
    x = x.contiguous()
    n = x.numel()
    codes, absmax = x.new_empty((n + 1) // 2, dtype=torch.uint8), x.new_empty(-(-n // block), dtype=torch.float32)
    bad = ctypes.c_int64(-1)
    given = (x.data_ptr(), DTYPES[x.dtype], n, block, bounds.data_ptr(), order.data_ptr())
    wanted = (codes.data_ptr(), absmax.data_ptr(), ctypes.byref(bad))
    done("quantize_4bit", found.lib.veneer_quantize(found.isa, torch.get_num_threads(), *given, *wanted))
    if bad.value >= 0:
        checks.check_finite(x, bad.value * block)
    return codes, absmax


def quantize_absmax(centered: Tensor, block: int) -> tuple[Tensor, Tensor]:
    found = native.library()
    if found is None:
        return reference.quantize_absmax(centered, block)
    n = centered.numel()
    codes, nested = centered.new_empty(n, dtype=torch.uint8), centered.new_empty(-(-n // block))
    given = (found.isa, torch.get_num_threads(), centered.data_ptr(), n, block, ctypes.byref(map8(dynamic_map())))
    done("quantize_absmax", found.lib.veneer_encode_absmax(*given, codes.data_ptr(), nested.data_ptr()))
    return codes, nested


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, levels: Tensor, offset: float, block: int) -> Tensor:
    found = native.library()
    if found is None:
        return reference.dequantize_absmax(codes, nested_absmax, levels, offset, block)
    out = codes.new_empty(codes.numel(), dtype=torch.float32)
    # blocks of 2 weights: one absmax per byte of codes
    w = Packed(codes, codes, levels[:16], nested_absmax, levels, offset, block, 2)
    struct, threads = as_struct(w, 1, 2 * codes.numel()), torch.get_num_threads()
    done("dequantize_absmax", found.lib.veneer_decode_absmax(found.isa, threads, struct, out.data_ptr()))
    return out


def dequantize(w: Packed, n: int, dtype: torch.dtype) -> Tensor:
    found = native.library()
    if found is None:
        return reference.dequantize(w, n, dtype)
    out = w.codes.new_empty(n, dtype=dtype)
    threads, struct = torch.get_num_threads(), as_struct(w, 1, n)
    done("dequantize_4bit", found.lib.veneer_dequantize(found.isa, threads, struct, out.data_ptr(), DTYPES[dtype]))
    return out


def matmul(x: Tensor, w: Packed, rows: int) -> Tensor:
    cols = x.shape[-1]
    y = _product("matmul", x, w, (rows, cols), rows)
    return reference.matmul(x.reshape(-1, cols), w, rows, dequantize).view(*x.shape[:-1], rows) if y is None else y


def matmul_backward(dy: Tensor, w: Packed, cols: int) -> Tensor:
    rows = dy.shape[-1]
    dx = _product("matmul_backward", dy, w, (rows, cols), cols)
    if dx is None:
        return reference.matmul_backward(dy.reshape(-1, rows), w, cols, dequantize).view(*dy.shape[:-1], cols)
    return dx


def _product(name: str, x: Tensor, w: Packed, shape: tuple[int, int], features: int) -> Tensor | None:
    """x times W (O, D) or its transpose by the C library; None if it is unavailable or lacks the shape."""
    found, n = native.library(), x.numel() // x.shape[-1]
    if found is None or shape[1] % w.block or n == 0:
        return None
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], features)
    run, threads = getattr(found.lib, f"veneer_{name}"), torch.get_num_threads()
    code = run(found.isa, threads, as_struct(w, *shape), x.data_ptr(), DTYPES[x.dtype], n, y.data_ptr())
    done(name.replace("matmul", "matmul_4bit"), code)
    return y


def lora_segments(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
    found, (n, d), (_, o, r) = native.library(), x.shape, b.shape
    if found is None or not 0 < n <= FEW or 0 in (o, r, slots.numel(), a.shape[0]):
        return reference.lora_segments(x, a, b, scale, starts, slots)
    x = x.contiguous()
    y = x.new_empty(n, o)
    given = (x.data_ptr(), DTYPES[x.dtype], n, d, o, r, *(t.data_ptr() for t in (a, b, scale, starts, slots)))
    threads = torch.get_num_threads()
    code = found.lib.veneer_lora_segments(found.isa, threads, *given, slots.numel(), y.data_ptr())
    done("lora_segments", code)
    return y
