"""FP4's table and known bytes."""

import torch

from tests.oracles import fourbit as oracle
from veneer.storage.fp4 import FP4, ORDER, FP4Config


def test_levels_are_twelfths_with_a_sign() -> None:
    levels, _, _ = FP4.tables()
    assert levels.tolist() == torch.tensor(oracle.fp4_levels(), dtype=torch.float32).tolist()


def test_order_is_that_of_the_levels() -> None:
    levels, bounds, order = FP4.tables()
    rising = levels[order.int()]
    assert bool((rising.diff() >= 0).all())
    assert sorted(ORDER) == list(range(16))
    assert [round(b, 6) for b in bounds.tolist()[8:]] == [
        0.002604,
        0.085938,
        0.208333,
        0.291667,
        0.416667,
        0.583333,
        0.833333,
    ]


def test_golden_bytes() -> None:
    x = torch.tensor([[-1, -0.7, -0.3, -0.05, 0, 0.04, 0.1, 0.25, 0.5, 0.9, -2, 1.5]])
    kept = FP4.of(x, FP4Config(double_quant=False))
    assert bytes(kept.codes.tolist()).hex(" ") == "dc e9 01 16 75 b2"
    want = [-1, -0.666667, -0.333333, -0.010417, 0, 0.010417, 0.010417, 0.333333, 0.5, 1, -2, 1.333333]
    assert torch.allclose(kept.dense(torch.float32), torch.tensor([want]), atol=1e-6)


def test_error_on_normal_weights_is_what_was_measured_with_the_authors_code() -> None:
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = (FP4.of(w, FP4Config()).dense(torch.float32) - w).square().mean().sqrt() / w.std()
    assert 0.120 < float(error) < 0.124
