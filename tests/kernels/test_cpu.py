"""The C library, with each instruction set, against the plain meaning and the oracle."""

import pytest
import torch
from torch import Tensor

from tests.kernels.weights import dense, packed, tables
from tests.oracles import fourbit as oracle
from veneer.errors import VeneerError
from veneer.kernels import cpu, native, reference
from veneer.kernels.dynamic_quant import dynamic_map

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(48, 576, 64), (50, 128, 32), (7, 256, 256), (33, 192, 64), (5, 4096, 4096), (65, 96, 32), (130, 1152, 128)]
"""O, D, G: D not a multiple of 128, O not of 4, blocks from 32 to 4096."""


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Within the rounding of the output and of the weights, relative to the whole (Frobenius)."""
    error = float((got.double() - want).norm() / want.norm())
    return error < {torch.float32: 2e-6, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantize_is_bit_identical(isa: str, kind: str, dtype: torch.dtype) -> None:
    _, bounds, order = tables(kind)
    rng = torch.Generator().manual_seed(1)
    for n, block in ((4096, 64), (1000, 32), (131072 + 77, 64), (8192, 4096), (33, 32), (5, 32)):
        x = (torch.randn(n, generator=rng) * 0.02).to(dtype)
        x[: min(n, 2 * block)] = 0  # blocks of zeros
        for got, want in zip(
            cpu.quantize(x, bounds, order, block), reference.quantize(x, bounds, order, block), strict=True
        ):
            assert torch.equal(got, want), (n, block)


@pytest.mark.parametrize("bounds", [tables("nf4")[1], tables("fp4")[1], torch.linspace(-0.1, 0.1, 15)])
def test_numbers_next_to_a_bound_are_on_their_side_of_it(isa: str, bounds: Tensor) -> None:
    """Of bounds that lie apart, as a format's do, and of others, which are searched without a table."""
    order = torch.arange(16, dtype=torch.uint8).flip(0)
    near = [bounds, *(bounds.nextafter(torch.tensor(s)) for s in (-2.0, 2.0)), torch.linspace(-1, 1, 4096)]
    x = torch.cat([*near, torch.zeros(2), -torch.zeros(2), torch.zeros(-(sum(map(len, near)) + 4) % 63)])
    x = torch.cat([torch.ones(len(x) // 63, 1), x.view(-1, 63)], 1)  # so that absmax is 1
    codes, _ = cpu.quantize(x, bounds, order, 64)
    got = torch.stack([codes >> 4, codes & 15], 1).view(x.shape)
    assert torch.equal(got, 15 - (bounds < x[..., None]).sum(-1).to(torch.uint8))


def test_quantize_takes_numbers_of_any_size(isa: str) -> None:
    _, bounds, order = tables()
    for scale in (1e-44, 1e-39, 1e-38, 1e-30, 1.0, 1e30, 3e38):
        x = torch.linspace(-1, 1, 64) * scale
        for got, want in zip(cpu.quantize(x, bounds, order, 64), reference.quantize(x, bounds, order, 64), strict=True):
            assert torch.equal(got, want), scale


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_is_bit_identical(isa: str, nested: bool, dtype: torch.dtype) -> None:
    for rows, cols, block in [*SHAPES, (3, 11, 32), (700, 193, 64)]:
        w = packed(rows, cols, block, nested)
        got = cpu.dequantize(w, rows * cols, dtype)
        assert torch.equal(got, reference.dequantize(w, rows * cols, dtype)), (rows, cols, block)


def test_every_half_and_rounding_is_right(isa: str) -> None:
    """All exponents, ties and subnormals of a 16-bit result."""
    values = torch.cat([torch.randn(4096) * 2.0**e for e in range(-30, 17)])
    values = torch.cat([values, torch.arange(1, 2049) * 2.0**-25, 1 + torch.arange(512) * 2.0**-12])
    levels = torch.zeros(16)
    levels[15] = 1.0
    w = reference.Packed(
        torch.full((16 * values.numel(),), 255, dtype=torch.uint8), values, levels, None, None, 0.0, 256, 32
    )
    for dtype in (torch.bfloat16, torch.float16):
        got = cpu.dequantize(w, 32 * values.numel(), dtype).view(-1, 32)
        assert torch.equal(got, values.to(dtype)[:, None].expand(-1, 32))


def test_nested_absmax_decode_bit_exactly(isa: str) -> None:
    levels = torch.tensor(oracle.dynamic_map(), dtype=torch.float32)
    for n, block in ((1, 256), (256, 256), (300, 256), (70001, 256), (999, 100)):
        codes = torch.randint(0, 256, (n,), dtype=torch.uint8)
        nested = torch.rand(-(-n // block))
        got = cpu.dequantize_absmax(codes, nested, levels, 0.3, block)
        assert torch.equal(got, reference.dequantize_absmax(codes, nested, levels, 0.3, block))
        if n <= 300:
            assert got.tolist() == oracle.decode_absmax(codes.tolist(), nested, levels, 0.3, block).tolist()


def test_nested_absmax_encode_as_the_meaning_does(isa: str) -> None:
    """Blocks of 256 go through lanes; those of zeros, of tiny numbers, other sizes and the last through the meaning."""
    c = torch.randn(40000, generator=torch.Generator().manual_seed(3)) * 0.01
    c[:256] = 0
    c[256:512] *= 1e-38
    c[512:767], c[767] = dynamic_map().bounds, 1.0
    c[768:1023], c[1023] = dynamic_map().bounds.nextafter(torch.tensor(2.0)), -1.0
    for n, block in ((40000, 256), (39999, 256), (100, 256), (4096, 100), (4096, 512)):
        for got, want in zip(cpu.quantize_absmax(c[:n], block), reference.quantize_absmax(c[:n], block), strict=True):
            assert torch.equal(got, want), (n, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_products_both_ways(isa: str, dtype: torch.dtype, nested: bool, two_threads: None) -> None:
    rng = torch.Generator().manual_seed(2)
    for i, (rows, cols, block) in enumerate(SHAPES):
        w = packed(rows, cols, block, nested)
        whole = reference.dequantize(w, rows * cols, dtype).view(rows, cols).double()  # tested against the oracle
        for n in (1, 2, 3, 7, 16, 17, 40, 70) if isa.startswith("avx") else (1 + i, 17):
            x, dy = (torch.randn(n, k, generator=rng).to(dtype) for k in (cols, rows))
            assert close(cpu.matmul(x, w, rows), x.double() @ whole.T, dtype), (rows, cols, block, n)
            assert close(cpu.matmul_backward(dy, w, cols), dy.double() @ whole, dtype), (rows, cols, block, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_larger_than_every_tile(isa: str, dtype: torch.dtype, two_threads: None) -> None:
    if isa == "scalar":
        pytest.skip("the same code for every size")
    rows, cols, n = 1111, 2240, 571
    w = packed(rows, cols, 64, nested=True)
    whole = reference.dequantize(w, rows * cols, dtype).view(rows, cols).double()
    x, dy = torch.randn(n, cols).to(dtype), torch.randn(n, rows).to(dtype)
    assert close(cpu.matmul(x, w, rows), x.double() @ whole.T, dtype)
    assert close(cpu.matmul_backward(dy, w, cols), dy.double() @ whole, dtype)


def test_rows_that_are_no_multiple_of_the_block_go_through_panels(isa: str) -> None:
    for rows, cols in ((9, 33), (6, 100), (4, 40)):
        w = packed(rows, cols, 64)
        whole = dense(w, rows, cols, torch.float32).double()
        x, dy = torch.randn(2, 3, cols), torch.randn(2, 3, rows)
        assert close(cpu.matmul(x, w, rows), x.double() @ whole.T, torch.float32)
        assert close(cpu.matmul_backward(dy, w, cols), dy.double() @ whole, torch.float32)


def test_one_row_on_its_own_equals_the_row_in_a_batch(isa: str) -> None:
    """Decoding one token and decoding seven give the same tokens: no result depends on its neighbors."""
    for block in (32, 64, 256):
        w, x = packed(70, 256, block), torch.randn(7, 256).bfloat16()
        together = cpu.matmul(x, w, 70)
        alone = torch.cat([cpu.matmul(x[i : i + 1], w, 70) for i in range(7)])
        assert close(alone, together.double(), torch.bfloat16)
        assert not isa.startswith("avx") or torch.equal(alone, together)


def test_decoding_is_as_exact_as_a_dense_product_in_bfloat16(isa: str) -> None:
    """Measured from the weights as they are in float32, not as they are when rounded."""
    for rows, cols, block in ((512, 1024, 64), (512, 576, 32), (512, 4096, 4096)):
        w = packed(rows, cols, block)
        exact = reference.dequantize(w, rows * cols, torch.float32).view(rows, cols)
        x = torch.randn(7, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
        want = x.double() @ exact.double().T
        dense = x @ exact.bfloat16().T
        error, allowed = (float((y.double() - want).norm()) for y in (cpu.matmul(x, w, rows), dense))
        assert error < 1.1 * allowed


def test_the_same_call_gives_the_same_bits_with_any_threads(isa: str) -> None:
    w, before = packed(130, 1152, 64, nested=True), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for n in (3, 90):
                x = torch.randn(n, 1152, generator=torch.Generator().manual_seed(n)).bfloat16()
                results.append((cpu.matmul(x, w, 130), cpu.matmul_backward(x[:, :130].contiguous(), w, 1152)))
    finally:
        torch.set_num_threads(before)
    if isa != "absent":
        for i in (0, 1):
            for again in results[i::2]:
                assert all(torch.equal(a, b) for a, b in zip(again, results[i], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments(isa: str, dtype: torch.dtype, two_threads: None) -> None:
    for n, d, o, r in ((1, 64, 48, 1), (6, 576, 130, 8), (40, 33, 300, 5)):
        x, a, b = torch.randn(n, d).to(dtype), torch.randn(3, r, d), torch.randn(3, o, r)
        scale, starts = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0, n // 3, n // 3, 2 * n // 3, n])
        slots = torch.tensor([2, 1, -1, 0])
        got = cpu.lora_segments(x, a, b, scale, starts, slots)
        want = torch.zeros(n, o, dtype=torch.float64)
        for i, slot in enumerate([2, 1, -1, 0]):
            rows = slice(int(starts[i]), int(starts[i + 1]))
            if slot >= 0:
                want[rows] = scale[slot] * (x[rows].double() @ a[slot].double().T @ b[slot].double().T)
        assert torch.allclose(got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
        assert (got[n // 3 : 2 * n // 3] == 0).all()


def test_a_refusal_of_the_library_is_an_error() -> None:
    cpu.done("matmul_4bit", 0)
    with pytest.raises(VeneerError, match="matmul_4bit: the C library failed: a tensor's address is not a multiple"):
        cpu.done("matmul_4bit", -2)


def test_the_library_itself_refuses_what_it_cannot_take(isa: str) -> None:
    if isa == "absent":
        pytest.skip("it is turned off here")
    found = native.library()
    assert found is not None
    w, x, y = packed(4, 96, 64), torch.zeros(1, 96), torch.zeros(1, 4)
    call = found.lib.veneer_matmul
    assert call(found.isa, 1, cpu.as_struct(w, 4, 96), x.data_ptr(), 0, 1, y.data_ptr()) == -2  # D no multiple of G
    good = cpu.as_struct(packed(4, 128), 4, 128)
    assert call(99, 1, good, x.data_ptr(), 0, 1, y.data_ptr()) == -1  # no such instruction set
    assert call(found.isa, 1, good, x.data_ptr() + 1, 0, 1, y.data_ptr()) == -2  # misaligned
    assert call(found.isa, 1, good, x.data_ptr(), 2, 1, y.data_ptr()) == -2  # float16 rows
    assert call(found.isa, 1, good, x.data_ptr(), 0, 0, y.data_ptr()) == -2  # no rows
