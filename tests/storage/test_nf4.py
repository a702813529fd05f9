"""NF4's table and known bytes."""

from math import isclose

import torch

from tests.oracles import fourbit as oracle
from veneer.storage.nf4 import LEVELS, NF4, NF4Config


def test_levels_are_normal_quantiles() -> None:
    """The authors made their table with a float32 linspace, so it is within float32's spacing of the exact one."""
    assert all(isclose(a, b, abs_tol=2**-22) for a, b in zip(LEVELS, oracle.nf4_levels(), strict=True))
    assert LEVELS[7] == 0.0
    assert sum(v < 0 for v in LEVELS) == 7


def test_levels_are_float32_numbers() -> None:
    assert torch.tensor(LEVELS, dtype=torch.float64).float().tolist() == list(LEVELS)


def test_bounds_are_half_way() -> None:
    _, bounds, order = NF4.tables()
    assert [round(b, 5) for b in bounds.tolist()[7:]] == [
        0.03979,
        0.12026,
        0.20352,
        0.29201,
        0.38931,
        0.50166,
        0.64279,
        0.86148,
    ]
    assert order.tolist() == list(range(16))


def test_golden_bytes() -> None:
    x = torch.tensor([[-1, -0.7, -0.3, -0.05, 0, 0.04, 0.1, 0.25, 0.5, 0.9, -2, 1.5]])
    kept = NF4.of(x, NF4Config(double_quant=False))
    assert bytes(kept.codes.tolist()).hex(" ") == "23 57 77 89 ac 0e"
    assert kept.absmax.tolist() == [2.0]
    want = [-1.050146, -0.789835, -0.369547, 0, 0, 0, 0.159161, 0.32186, 0.492225, 0.88142, -2, 1.445914]
    assert torch.allclose(kept.dense(torch.float32), torch.tensor([want]), atol=1e-6)


def test_zeros() -> None:
    kept = NF4.of(torch.zeros(1, 64), NF4Config(double_quant=False))
    assert kept.absmax.tolist() == [0.0]
    assert kept.codes.tolist() == [0x77] * 32
    assert not kept.dense(torch.float32).any()


def test_error_on_normal_weights_is_what_was_measured_with_the_authors_code() -> None:
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = (NF4.of(w, NF4Config()).dense(torch.float32) - w).square().mean().sqrt() / w.std()
    assert 0.091 < float(error) < 0.093
