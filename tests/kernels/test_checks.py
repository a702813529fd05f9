"""Each thing an op refuses, with its words."""

import re

import pytest
import torch

from tests.kernels.weights import packed, tables
from veneer.errors import InputError
from veneer.kernels import ops

LEVELS, BOUNDS, ORDER = tables()


def refuses(words: str, call: object, *arguments: object) -> None:
    with pytest.raises((InputError, IndexError), match=re.escape(words)):
        call(*arguments)  # type: ignore[operator]


def test_quantize_refuses() -> None:
    q = ops.quantize_4bit
    x = torch.ones(64)
    refuses("block is 48, should be one of 32, 64", q, x, BOUNDS, ORDER, 48)
    refuses("x is torch.int64, should be one of torch.float32", q, x.long(), BOUNDS, ORDER, 64)
    refuses("x is empty", q, x[:0], BOUNDS, ORDER, 64)
    refuses("bounds is (14,) torch.float32, should be (15,) torch.float32", q, x, BOUNDS[:14], ORDER, 64)
    refuses("order is (16,) torch.int64, should be (16,) torch.uint8", q, x, BOUNDS, ORDER.long(), 64)


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_named_with_its_place(value: float, shown: str, dtype: torch.dtype, isa: str) -> None:
    x = torch.ones(3, 100, dtype=dtype)
    x[1, 77], x[2, 0] = value, float("nan")
    refuses(f"the weight holds {shown} at position 177", ops.quantize_4bit, x, BOUNDS, ORDER, 64)
    last = torch.ones(70, dtype=dtype)
    last[69] = value
    refuses(f"the weight holds {shown} at position 69", ops.quantize_4bit, last, BOUNDS, ORDER, 64)


def test_absmax_ops_refuse() -> None:
    levels = torch.linspace(-1, 1, 256)
    refuses("0 values in blocks of 256", ops.quantize_absmax, torch.ones(0), 256)
    refuses("values is (3,) torch.float64", ops.quantize_absmax, torch.ones(3).double(), 256)
    codes = torch.zeros(300, dtype=torch.uint8)
    refuses("nested_absmax is (1,)", ops.dequantize_absmax, codes, torch.ones(1), levels, 0.0, 256)
    refuses("levels is (5,)", ops.dequantize_absmax, codes, torch.ones(2), levels[:5], 0.0, 256)


def test_products_refuse_a_weight_that_does_not_fit() -> None:
    x, w = torch.ones(2, 64), packed(8, 64, 64, nested=True)
    m = ops.matmul_4bit
    refuses("codes has 256 elements of torch.uint8, a weight of 9 x 64 has 288 bytes", m, x, w, 9)
    refuses("block is 33", m, x, w._replace(block=33), 8)
    refuses("absmax is (7,) torch.uint8, should be (8,)", m, x, w._replace(absmax=w.absmax[:7]), 8)
    refuses("nested_absmax and nested_levels go together", m, x, w._replace(nested_levels=None), 8)
    refuses("nested_block is 0", m, x, w._replace(nested_block=0), 8)
    refuses("levels is (16,) torch.float64", m, x, w._replace(levels=LEVELS.double()), 8)
    refuses("codes has 256", m, x, w._replace(codes=torch.zeros(512, dtype=torch.uint8)[::2]), 8)
    refuses("absmax is not contiguous", m, x, packed(8, 64)._replace(absmax=torch.ones(16)[::2]), 8)


def test_products_refuse_rows_of_another_kind() -> None:
    w = packed(8, 64)
    refuses(
        "x is torch.float16, should be torch.float32 or torch.bfloat16", ops.matmul_4bit, torch.ones(64).half(), w, 8
    )
    refuses("x has shape (), should be (..., features)", ops.matmul_4bit, torch.ones(()), w, 8)
    refuses("dy is torch.float64", torch.ops.veneer.matmul_4bit_backward, torch.ones(1, 8).double(), *w, 64)


def test_dequantize_refuses() -> None:
    w = packed(8, 64)
    refuses("dtype is torch.int32", ops.dequantize_4bit, w, (8, 64), torch.int32)
    refuses("shape is (8, 0)", ops.dequantize_4bit, w, (8, 0), torch.float32)
    refuses("has 260 bytes", ops.dequantize_4bit, w, (8, 65), torch.float32)


def test_segments_refuse() -> None:
    x, a, b, scale = torch.ones(4, 8), torch.ones(2, 3, 8), torch.ones(2, 5, 3), torch.ones(2)
    starts, slots = torch.tensor([0, 2, 4]), torch.tensor([0, 1])
    f = ops.lora_segments
    refuses("b is (2, 5, 4) torch.float32, should be (2, 5, 3)", f, x, a, torch.ones(2, 5, 4), scale, starts, slots)
    refuses("x is (N, D), a (S, R, D), b (S, O, R)", f, x[0], a, b, scale, starts, slots)
    refuses("slots [2] are outside [-1, 2)", f, x, a, b, scale, starts, torch.tensor([0, 2]))
    refuses(
        "starts should rise from 0 to 4 rows, got [0, 3, 2, 4]",
        f,
        x,
        a,
        b,
        scale,
        torch.tensor([0, 3, 2, 4]),
        torch.tensor([0, 1, 0]),
    )
    refuses("starts should rise from 0 to 4 rows, got [0, 2, 5]", f, x, a, b, scale, torch.tensor([0, 2, 5]), slots)
    refuses("starts is (2,) torch.int64, should be (3,)", f, x, a, b, scale, starts[:2], slots)
