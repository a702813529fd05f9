"""The kernels as torch operators `veneer::*`: schema, checks, implementations and gradients.

reference.py defines what each op computes, and runs on every device but the CPU; checks.py has the argument checks,
cpu.py the CPU implementation. The product has a gradient for x only: W is frozen.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import checks, cpu, functorch, reference
from veneer.kernels.reference import Packed

WEIGHT = (
    "Tensor codes, Tensor absmax, Tensor levels, Tensor? nested_absmax, Tensor? nested_levels, float offset, "
    "int nested_block, int block"
)
"""A `Packed`, field by field."""
LIBRARY: Any = torch.library.Library("veneer", "DEF")  # type: ignore[no-untyped-call]
Kernel = Callable[..., Any]
OneTensor = Callable[..., Tensor]
TwoTensors = Callable[..., tuple[Tensor, Tensor]]


def define(schema: str, plain: Kernel, on_cpu: Kernel, fake: Kernel) -> None:
    """Register an op: the reference for all devices, the CPU version, and a fake (shapes only) for tracing."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"veneer::{name}", fake, lib=LIBRARY)


def quantizer(kernel: TwoTensors) -> TwoTensors:
    def op(x: Tensor, bounds: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
        checks.check_quantize(x, bounds, order, block)
        return kernel(x, bounds, order, block)

    return op


def quantize_plain(x: Tensor, bounds: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    checks.check_finite(x)
    return reference.quantize(x, bounds, order, block)


def quantize_fake(x: Tensor, bounds: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    n = x.numel()
    return x.new_empty((n + 1) // 2, dtype=torch.uint8), x.new_empty(-(-n // block), dtype=torch.float32)


define(
    "quantize_4bit(Tensor x, Tensor bounds, Tensor order, int block) -> (Tensor, Tensor)",
    *map(quantizer, (quantize_plain, cpu.quantize, quantize_fake)),
)


def absmax_quantizer(kernel: TwoTensors) -> TwoTensors:
    def op(centered: Tensor, block: int) -> tuple[Tensor, Tensor]:
        checks.check_absmax("quantize_absmax", centered, torch.float32, block)
        return kernel(centered, block)

    return op


def quantize_absmax_fake(centered: Tensor, block: int) -> tuple[Tensor, Tensor]:
    n = centered.numel()
    return centered.new_empty(n, dtype=torch.uint8), centered.new_empty(-(-n // block))


define(
    "quantize_absmax(Tensor centered, int block) -> (Tensor, Tensor)",
    *map(absmax_quantizer, (reference.quantize_absmax, cpu.quantize_absmax, quantize_absmax_fake)),
)


def absmax_dequantizer(kernel: OneTensor) -> OneTensor:
    def op(codes: Tensor, nested_absmax: Tensor, levels: Tensor, offset: float, block: int) -> Tensor:
        checks.check_absmax("dequantize_absmax", codes, torch.uint8, block)
        blocks = -(-codes.numel() // block)
        checks.check_tensor("dequantize_absmax", "levels", levels, (256,), torch.float32)
        checks.check_tensor("dequantize_absmax", "nested_absmax", nested_absmax, (blocks,), torch.float32)
        return kernel(codes, nested_absmax, levels, offset, block)

    return op


def dequantize_absmax_fake(codes: Tensor, nested_absmax: Tensor, levels: Tensor, offset: float, block: int) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=torch.float32)


define(
    "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor levels, float offset, int block) -> Tensor",
    *map(absmax_dequantizer, (reference.dequantize_absmax, cpu.dequantize_absmax, dequantize_absmax_fake)),
)


def dequantizer(kernel: OneTensor) -> OneTensor:
    def op(*arguments: Any) -> Tensor:
        w, (shape, dtype) = Packed(*arguments[:8]), arguments[8:]
        return kernel(w, checks.check_dequantize(w, shape, dtype), dtype).view(shape)

    return op


def dequantize_fake(w: Packed, n: int, dtype: torch.dtype) -> Tensor:
    return w.codes.new_empty(n, dtype=dtype)


define(
    f"dequantize_4bit({WEIGHT}, SymInt[] shape, ScalarType dtype) -> Tensor",
    *map(dequantizer, (reference.dequantize, cpu.dequantize, dequantize_fake)),
)


def multiplier(kernel: OneTensor) -> OneTensor:
    def op(x: Tensor, *arguments: Any) -> Tensor:
        w, rows = Packed(*arguments[:8]), arguments[8]
        checks.check_rows("matmul_4bit", "x", x)
        checks.check_weight("matmul_4bit", w, rows, x.shape[-1])
        return kernel(x, w, rows)

    return op


def back_multiplier(kernel: OneTensor) -> OneTensor:
    def op(dy: Tensor, *arguments: Any) -> Tensor:
        w, cols = Packed(*arguments[:8]), arguments[8]
        checks.check_rows("matmul_4bit_backward", "dy", dy)
        checks.check_weight("matmul_4bit_backward", w, dy.shape[-1], cols)
        return kernel(dy, w, cols)

    return op


def matmul_plain(x: Tensor, w: Packed, rows: int) -> Tensor:
    return reference.matmul(x.reshape(-1, x.shape[-1]), w, rows).view(*x.shape[:-1], rows)


def matmul_backward_plain(dy: Tensor, w: Packed, cols: int) -> Tensor:
    return reference.matmul_backward(dy.reshape(-1, dy.shape[-1]), w, cols).view(*dy.shape[:-1], cols)


def resized(x: Tensor, w: Packed, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


define(f"matmul_4bit(Tensor x, {WEIGHT}, SymInt rows) -> Tensor", *map(multiplier, (matmul_plain, cpu.matmul, resized)))
define(
    f"matmul_4bit_backward(Tensor dy, {WEIGHT}, SymInt cols) -> Tensor",
    *map(back_multiplier, (matmul_backward_plain, cpu.matmul_backward, resized)),
)


def save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.cols = inputs[0].shape[-1]
    ctx.save_for_backward(*inputs[1:6])
    ctx.numbers = inputs[6:9]


def matmul_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dx = dL/dy W; no gradient for W."""
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.veneer.matmul_4bit_backward(dy, *ctx.saved_tensors, *ctx.numbers, ctx.cols)
    return (dx, *([None] * 9))


torch.library.register_autograd("veneer::matmul_4bit", matmul_gradient, setup_context=save_weight, lib=LIBRARY)


def save_weight_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_weight(ctx, inputs, output)
    ctx.rows = inputs[0].shape[-1]


def matmul_backward_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives: the gradient of dx = dy W with respect to dy is ddx W^T."""
    return (torch.ops.veneer.matmul_4bit(ddx, *ctx.saved_tensors, *ctx.numbers, ctx.rows), *([None] * 9))


torch.library.register_autograd(
    "veneer::matmul_4bit_backward", matmul_backward_gradient, setup_context=save_weight_backward, lib=LIBRARY
)


def segmenter(kernel: OneTensor, values: bool = True) -> OneTensor:
    def op(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
        checks.check_segments(x, a, b, scale, starts, slots)
        if values:
            checks.check_segment_values(x.shape[0], a.shape[0], starts.tolist(), slots.tolist())
        return kernel(x, a, b, scale, starts, slots)

    return op


def segments_fake(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[1])


define(
    "lora_segments(Tensor x, Tensor a, Tensor b, Tensor scale, Tensor starts, Tensor slots) -> Tensor",
    segmenter(reference.lora_segments),
    segmenter(cpu.lora_segments),
    segmenter(segments_fake, values=False),
)


def save_segments(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def segments_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, da, db, ds of y = s B A x, segment by segment."""
    x, a, b, scale, starts, slots = ctx.saved_tensors
    dx, da, db, ds = map(torch.zeros_like, (x, a, b, scale))
    for (first, last), slot in zip(pairwise(starts.tolist()), slots.tolist(), strict=True):
        if slot < 0:
            continue
        g, rows = dy[first:last].float(), x[first:last].float()
        t, dt = rows @ a[slot].T, g @ b[slot]
        dx[first:last] = (dt @ a[slot] * scale[slot]).to(x.dtype)
        da[slot] += dt.T @ rows * scale[slot]
        db[slot] += g.T @ t * scale[slot]
        ds[slot] += (t * dt).sum()
    return dx, da, db, ds, None, None


torch.library.register_autograd("veneer::lora_segments", segments_gradient, setup_context=save_segments, lib=LIBRARY)


# ---- the public functions


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """reference.quantize.  Raises InputError for a NaN or an infinity in x."""
    codes, absmax = torch.ops.veneer.quantize_4bit(x, bounds, order, block)
    return codes, absmax


def quantize_absmax(centered: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """reference.quantize_absmax."""
    codes, nested = torch.ops.veneer.quantize_absmax(centered, block)
    return codes, nested


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, levels: Tensor, offset: float, block: int) -> Tensor:
    """reference.dequantize_absmax."""
    out: Tensor = torch.ops.veneer.dequantize_absmax(codes, nested_absmax, levels, offset, block)
    return out


def dequantize_4bit(w: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """W in `shape` and `dtype` (float32, bfloat16 or float16)."""
    out: Tensor = torch.ops.veneer.dequantize_4bit(*w, shape, dtype)
    return out


def matmul_4bit(x: Tensor, w: Packed, rows: int) -> Tensor:
    """y (..., O) = x (..., D) W^T, W (O, D) rounded to x's dtype (float32 or bfloat16), accumulated in float32.

    For up to 16 rows a kernel may round W's levels instead and multiply by absmax afterwards, which is no less exact.
    Under torch.func and forward-mode AD, W is dequantized for the product, so that torch can differentiate it.
    """
    if functorch.differentiating():
        checks.check_rows("matmul_4bit", "x", x)
        return F.linear(x, dequantize_4bit(w, (rows, x.shape[-1]), x.dtype))
    y: Tensor = torch.ops.veneer.matmul_4bit(x, *w, rows)
    return y


def lora_segments(x: Tensor, a: Tensor, b: Tensor, scale: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
    """reference.lora_segments.  Raises IndexError for a slot outside [-1, S)."""
    if functorch.differentiating():  # the reference is differentiable by torch
        return segmenter(reference.lora_segments)(x, a, b, scale, starts, slots)
    y: Tensor = torch.ops.veneer.lora_segments(x, a, b, scale, starts, slots)
    return y
