"""The plain meaning against the NumPy oracle, and by hand."""

import numpy as np
import pytest
import torch

from tests.kernels.weights import LEVELS, dense, packed, tables
from tests.oracles import fourbit as oracle
from veneer.kernels import reference


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [64, 100, 101, 31])
def test_quantize_finds_the_nearest_level(kind: str, n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    _, bounds, order = tables(kind)
    codes, absmax = reference.quantize(x, bounds, order, 32)
    assert absmax.tolist() == pytest.approx(oracle.absmax(x.tolist(), 32), abs=0)
    scaled = [v / float(absmax[i // 32]) for i, v in enumerate(x.tolist())]
    got = [LEVELS[kind][c] for c in oracle.unpack(codes.tolist(), n)]
    want = [LEVELS[kind][oracle.nearest(v, LEVELS[kind])] for v in scaled]
    assert got == want
    assert codes.numel() == (n + 1) // 2


def test_an_odd_count_is_padded_with_the_code_of_zero() -> None:
    _, bounds, order = tables()
    codes, _ = reference.quantize(torch.ones(33), bounds, order, 32)
    assert codes[-1].item() == 0xF7


def test_a_tie_goes_to_the_lower_level() -> None:
    _, bounds, order = tables()
    x = torch.cat([bounds, torch.ones(17)])  # absmax 1: every bound is half way between two levels
    codes, _ = reference.quantize(x, bounds, order, 32)
    assert oracle.unpack(codes.tolist(), 15) == list(range(15))


def test_zeros_keep_absmax_zero_in_whole_blocks_and_the_least_in_a_last_shorter_one() -> None:
    _, bounds, order = tables()
    codes, absmax = reference.quantize(torch.zeros(70), bounds, order, 64)
    assert codes.tolist() == [0x77] * 35
    assert absmax.tolist() == [0.0, float(np.float32(1e-38))]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "cols", "block"), [(4, 64, 64), (3, 50, 32), (5, 7, 32), (300, 64, 64)])
def test_dequantize_is_one_rounded_product(rows: int, cols: int, block: int, nested: bool) -> None:
    w = packed(rows, cols, block, nested)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = reference.dequantize(w, rows * cols, dtype).view(rows, cols)
        assert torch.equal(got, dense(w, rows, cols, dtype))


def test_absmax_goes_to_the_nearest_of_256_levels() -> None:
    levels = torch.tensor(oracle.dynamic_map(), dtype=torch.float32)
    c = torch.randn(300, generator=torch.Generator().manual_seed(0))
    codes, nested = reference.quantize_absmax(c, 256)
    assert nested.tolist() == pytest.approx(oracle.absmax(c.tolist(), 256), abs=0)
    for v, code, i in zip(c.tolist(), codes.tolist(), range(300), strict=True):
        scaled = v / float(nested[i // 256])
        best = min(abs(level - scaled) for level in levels.tolist())
        assert abs(float(levels[code]) - scaled) <= best + 1e-7


def test_equal_absmax_leave_nothing_to_quantize() -> None:
    levels = torch.tensor(oracle.dynamic_map(), dtype=torch.float32)
    codes, nested = reference.quantize_absmax(torch.zeros(5), 256)
    assert codes.tolist() == [0] * 5
    assert reference.dequantize_absmax(codes, nested, levels, 0.75, 256).tolist() == [0.75] * 5


def test_products_over_panels_equal_products_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PANEL", 128)
    for rows, cols, block in ((10, 48, 32), (7, 33, 32), (5, 64, 64)):
        w = packed(rows, cols, block)
        whole = dense(w, rows, cols, torch.float32)
        x, dy = torch.randn(3, cols), torch.randn(3, rows)
        assert len(reference.panels(w, rows, cols)) >= 1
        assert torch.allclose(reference.matmul(x, w, rows), x @ whole.T, atol=1e-5)
        assert torch.allclose(reference.matmul_backward(dy, w, cols), dy @ whole, atol=1e-5)


def test_panels_begin_with_a_block_and_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PANEL", 64)
    w = packed(64, 33, 32)
    cut = reference.panels(w, 64, 33)
    assert [first for first, _, _ in cut] == [0, 32]


def test_segments_are_a_loop_over_rows() -> None:
    x, a, b = torch.randn(5, 6), torch.randn(3, 2, 6), torch.randn(3, 4, 2)
    scale, slot = torch.tensor([0.5, 2.0, 3.0]), [2, 0, 0, -1, 1]
    y = reference.lora_segments(x, a, b, scale, torch.tensor([0, 1, 3, 4, 5]), torch.tensor([2, 0, -1, 1]))
    for row, s in zip(range(5), slot, strict=True):
        want = torch.zeros(4) if s < 0 else scale[s] * (b[s] @ (a[s] @ x[row]))
        assert torch.allclose(y[row], want, atol=1e-5)
