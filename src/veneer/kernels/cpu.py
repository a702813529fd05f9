"""The ops on a CPU: by the C library where there is one and the shape suits it, else by the plain meaning.

Arguments have been checked (checks.py) when they come here.
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
"""Rows up to which LoRA segments are computed row by row; torch's matrix products are faster above."""
MISALIGNED = "a tensor begins at an address that is no multiple of its numbers' size; give a .clone() of it"
FAILURES = {-1: "this machine lacks the instruction set", -2: MISALIGNED, -3: "no memory for scratch"}


def done(op: str, code: int) -> None:
    """Turn a status of the C library into an error."""
    if code:
        raise VeneerError(f"{op}: the C library refused: {FAILURES.get(code, code)}")


def as_struct(w: Packed, rows: int, cols: int) -> Any:
    """`veneer_weight`, by reference; the tensors must outlive the call."""
    absmax = w.absmax.data_ptr()
    plain = w.nested_absmax is None or w.nested_levels is None
    made = native.Weight(
        w.codes.data_ptr(),
        absmax if plain else None,
        None if plain else absmax,
        None if w.nested_absmax is None else w.nested_absmax.data_ptr(),
        None if w.nested_levels is None else w.nested_levels.data_ptr(),
        w.levels.data_ptr(),
        w.offset,
        w.nested_block,
        rows,
        cols,
        w.block,
    )
    return ctypes.byref(made)


def map8(table: DynamicMap) -> native.Map8:
    """`veneer_map8`; the table must outlive it."""
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
    w = Packed(codes, codes, levels[:16], nested_absmax, levels, offset, block, 2)  # blocks of 2: an absmax each byte
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
    found, cols = native.library(), x.shape[-1]
    n = x.numel() // cols
    if found is None or cols % w.block or n == 0:
        return reference.matmul(x.reshape(-1, cols), w, rows, dequantize).view(*x.shape[:-1], rows)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    threads, struct = torch.get_num_threads(), as_struct(w, rows, cols)
    code = found.lib.veneer_matmul(found.isa, threads, struct, x.data_ptr(), DTYPES[x.dtype], n, y.data_ptr())
    done("matmul_4bit", code)
    return y


def matmul_backward(dy: Tensor, w: Packed, cols: int) -> Tensor:
    found, rows = native.library(), dy.shape[-1]
    n = dy.numel() // rows
    if found is None or cols % w.block or n == 0:
        return reference.matmul_backward(dy.reshape(-1, rows), w, cols, dequantize).view(*dy.shape[:-1], cols)
    dy = dy.contiguous()
    dx = dy.new_empty(*dy.shape[:-1], cols)
    threads, struct = torch.get_num_threads(), as_struct(w, rows, cols)
    call = found.lib.veneer_matmul_backward
    done("matmul_4bit_backward", call(found.isa, threads, struct, dy.data_ptr(), DTYPES[dy.dtype], n, dx.data_ptr()))
    return dx


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
