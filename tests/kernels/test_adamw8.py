"""AdamW with 8-bit state: the kernel against its meaning, the meaning against bitsandbytes and the formula."""

from typing import Any

import numpy as np
import pytest
import torch

from veneer.errors import InputError
from veneer.kernels import native
from veneer.kernels.adamw8 import BLOCK, Moments, Rates, adamw_8bit_, decode, encode, step_cpu, step_plain
from veneer.kernels.dynamic_quant import dynamic_map


def fresh(blocks: int) -> Moments:
    n = blocks * BLOCK
    codes = torch.full((n,), 127, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    return Moments(*codes, torch.zeros(blocks), torch.zeros(blocks))


def gradients(n: int, steps: int) -> list[torch.Tensor]:
    """Numbers of many magnitudes, with blocks and stretches of zeros and tiny ones."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        g = torch.randn(n, generator=rng) * 10 ** (6 * torch.rand(n, generator=rng) - 6)
        g[:BLOCK] = 0
        g[BLOCK : 2 * BLOCK] *= 1e-30
        g[3 * BLOCK : 3 * BLOCK + 40] = 0
        made.append(g)
    return made


@pytest.fixture(params=range(len(native.ISAS)), ids=native.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    found = native.library()
    if found is None:
        pytest.skip("needs the C library")
    if not found.lib.veneer_has(request.param):
        pytest.skip(f"this machine has no {native.ISAS[request.param]}")
    chosen = native.Native(found.lib, request.param, found.status)
    monkeypatch.setattr(native, "library", lambda: chosen)
    return int(request.param)


def test_every_instruction_set_computes_the_meaning_bit_for_bit(isa: int) -> None:
    n = 150 * BLOCK
    slow = torch.randn(n, generator=torch.Generator().manual_seed(1))
    fast, one, two = slow.clone(), fresh(150), fresh(150)
    for t, g in enumerate(gradients(n, 6), start=1):
        rates = Rates(1e-2, 0.9, 0.999, 1e-8, 0.1, t)
        step_plain(slow, g, one, rates)
        step_cpu(fast, g, two, rates)
        assert torch.equal(slow, fast)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_codes_next_to_every_bound_are_the_nearest(isa: int) -> None:
    """With beta = 0 and size 0 the new moments are the gradient and its square: encoded here, searched there."""
    for signed in (True, False):
        bounds = dynamic_map(signed).bounds
        x = torch.cat([bounds.nextafter(torch.tensor(s)) for s in (-2.0, 2.0)] + [bounds])
        x = torch.cat([x, x.nextafter(torch.tensor(2.0)), torch.linspace(-1 if signed else 0, 1, 3000)])
        x = x if signed else x.clamp(min=0).sqrt()
        x = torch.cat([x, torch.zeros(-len(x) % (BLOCK - 1))]).view(-1, BLOCK - 1)
        x = torch.cat([torch.ones(len(x), 1), x], 1).view(-1)  # so that absmax is 1
        moments, nothing = fresh(len(x) // BLOCK), torch.zeros_like(x)
        step_cpu(nothing, x, moments, Rates(0.0, 0.0, 0.0, 1.0, 0.0, 1))
        wanted = torch.searchsorted(bounds, x if signed else x * x)
        assert torch.equal((moments.codes1 if signed else moments.codes2).long(), wanted)


def test_one_thread_or_two(isa: int) -> None:
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        values, moments = torch.ones(200 * BLOCK), fresh(200)
        for t, g in enumerate(gradients(200 * BLOCK, 2), start=1):
            step_cpu(values, g, moments, Rates(1e-2, 0.9, 0.999, 1e-8, 0.0, t))
        torch.set_num_threads(before)
        results.append((values, *moments))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_codes_mean_what_bitsandbytes_means() -> None:
    pytest.importorskip("bitsandbytes")
    levels = dynamic_map(True).levels
    x = torch.cat(gradients(8 * BLOCK, 2))
    codes, absmax = encode(x, True)
    scaled = (x.view(-1, BLOCK) * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    assert torch.equal(codes, torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8).view(-1))
    theirs = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, levels, BLOCK, torch.float32)
    assert torch.equal(decode(codes, absmax, True), theirs)


def test_a_step_is_bitsandbytes_step_on_a_cpu() -> None:
    """From the same state: their parameters to rounding, their state but where their encoder's table of 65536 cells
    takes the level beside the nearest one."""
    pytest.importorskip("bitsandbytes")
    n, signed, unsigned = 40 * BLOCK, dynamic_map(True).levels, dynamic_map(False).levels
    values, ours, theirs = torch.linspace(-1, 1, n), fresh(40), fresh(40)
    for t, g in enumerate(gradients(n, 5), start=1):
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)
        old = [decode(ours[which], ours[which + 2], two) for which, two in ((0, True), (1, False))]
        exact = 0.9 * old[0] + 0.1 * g, 0.999 * old[1] + 0.001 * g * g
        peer = values.clone()
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            *("adam", g, peer, theirs.codes1, theirs.codes2, 0.9, 0.999, 0.0, 0.0, 1e-8, t, 1e-2, signed, unsigned),
            *(theirs.absmax1, theirs.absmax2, 0.1, 1.0, False),
        )
        step_plain(values, g, ours, Rates(1e-2, 0.9, 0.999, 1e-8, 0.1, t))
        torch.testing.assert_close(values, peer, rtol=1e-5, atol=1e-6)
        for which, two in ((0, True), (1, False)):
            a, b = decode(ours[which], ours[which + 2], two), decode(theirs[which], theirs[which + 2], two)
            farther = (b - exact[which]).abs() - (a - exact[which]).abs()  # a cell of their table is 2 / 65536 wide
            assert (farther.view(-1, BLOCK).abs().amax(1) <= 1e-4 * ours[which + 2] + 1e-38).all()


def test_against_the_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    p: Any = rng.normal(size=BLOCK)
    values, moments = torch.tensor(p, dtype=torch.float32), fresh(1)
    m = v = np.zeros(BLOCK)
    for t in range(1, 8):
        g = rng.normal(size=BLOCK)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        p = p * (1 - 0.01 * 0.2) - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
        adamw_8bit_(values, torch.tensor(g, dtype=torch.float32), moments, Rates(0.01, 0.9, 0.99, 1e-3, 0.2, t))
    assert 0 < np.abs(values.numpy() - p).max() < 4e-3, "7 steps of 0.01, each off by some percent"


def test_what_does_not_fit_is_refused() -> None:
    moments, rates = fresh(2), Rates(1e-2, 0.9, 0.999, 1e-8, 0.0, 1)
    with pytest.raises(InputError, match="values has 500 elements, should be a multiple of 256"):
        adamw_8bit_(torch.zeros(500), torch.zeros(500), moments, rates)
    with pytest.raises(InputError, match=r"gradients is \(512,\) torch.float64, should be \(512,\) torch.float32"):
        adamw_8bit_(torch.zeros(512), torch.zeros(512, dtype=torch.float64), moments, rates)
    with pytest.raises(InputError, match=r"absmax2 is \(3,\) torch.float32, should be \(2,\)"):
        adamw_8bit_(torch.zeros(512), torch.zeros(512), moments._replace(absmax2=torch.zeros(3)), rates)
    with pytest.raises(InputError, match="gradients is not contiguous"):
        adamw_8bit_(torch.zeros(512), torch.zeros(1024)[::2], moments, rates)


def test_without_the_library_the_meaning_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    values, moments = torch.zeros(BLOCK), fresh(1)
    adamw_8bit_(values, torch.ones(BLOCK), moments, Rates(0.5, 0.9, 0.999, 1e-8, 0.0, 1))
    assert torch.allclose(values, torch.tensor(-0.5), rtol=1e-5)
