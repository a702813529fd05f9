"""int8 by its formula, against bitsandbytes, and with files that are wrong."""

import logging

import numpy as np
import pytest
import torch

from tests.storage.cases import SHAPES, weight
from veneer.errors import ModelError
from veneer.storage import STORAGES, config_from, from_tensors
from veneer.storage.int8 import Int8, Int8Config


def test_codes_are_the_nearest_of_127_steps() -> None:
    for shape in SHAPES:
        w = weight(shape)
        w[-1] = 0
        kept = Int8.of(w, Int8Config())
        rows = np.float32(w.numpy())
        absmax = np.abs(rows).max(1)
        for row, top, codes in zip(rows, absmax, kept.codes.tolist(), strict=True):
            want = [0] * len(row) if top == 0 else np.round(row * (np.float32(1) / top * np.float32(127))).tolist()
            assert codes == want
        assert kept.absmax.tolist() == absmax.tolist()


def test_error_is_at_most_half_a_step() -> None:
    w = weight((48, 576))
    kept = Int8.of(w, Int8Config())
    assert bool(((kept.dense(torch.float32) - w).abs() <= kept.absmax[:, None] / 254 * 1.001).all())


def test_as_bitsandbytes_quantizes_and_dequantizes() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight((48, 576), torch.float16, seed=1)
    codes, absmax, _ = functional.int8_vectorwise_quant(w)
    kept = Int8.of(w, Int8Config())
    assert torch.equal(kept.absmax, absmax)
    assert int((kept.codes.int() - codes.int()).abs().max()) <= 1  # theirs divides in float16
    assert torch.allclose(kept.dense(torch.float32), functional.int8_vectorwise_dequant(codes, absmax), atol=1e-3)


def test_names_on_disk() -> None:
    tensors = Int8.of(weight((4, 8)), Int8Config()).tensors("m.weight")
    assert {k: v.dtype for k, v in tensors.items()} == {
        "m.weight": torch.int8,
        "m.SCB": torch.float32,
        "m.weight_format": torch.uint8,
    }


def test_what_is_not_finite_is_named() -> None:
    for wrong in (float("inf"), float("nan"), 3e38):
        w = weight((4, 8))
        w[2, 3] = wrong
        with pytest.raises(ModelError, match=r"m\.weight: row 2 holds numbers that are not finite or too large"):
            STORAGES["int8"].of(w, config_from("int8", {}), "m.weight")


def test_numbers_of_8_bits_are_no_weight_to_quantize() -> None:
    w = weight((4, 8)).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"m\.weight: \(4, 8\) torch.float8_e4m3fn is not a floating-point matrix"):
        STORAGES["int8"].of(w, config_from("int8", {}), "m.weight")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"m.SCB": torch.ones(3)}, r"m\.SCB should be \(4,\) float32"),
        ({"m.SCB": torch.full((4,), float("nan"))}, r"m\.SCB holds numbers that are not finite"),
        ({"m.weight_format": torch.tensor(2)}, r"m\.weight_format is 2; only 0"),
        ({"m.weight_format": torch.zeros(2)}, r"m\.weight_format is \[0.0, 0.0\]; only 0"),
        ({"m.weight": torch.zeros(4, dtype=torch.int8)}, "the weight should be an int8 matrix"),
    ],
)
def test_a_file_that_is_wrong_is_refused(spoil: dict[str, torch.Tensor], words: str) -> None:
    tensors = Int8.of(weight((4, 8)), Int8Config()).tensors("m.weight")
    with pytest.raises(ModelError, match=words):
        from_tensors(tensors | spoil, "m.weight")


def test_products_go_panel_by_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.storage.int8.PANEL", 100)
    kept = Int8.of(weight((33, 50)), Int8Config())
    x = torch.randn(3, 50, requires_grad=True)
    y = kept.matmul(x)
    assert torch.allclose(y, x @ kept.dense(torch.float32).T, atol=1e-6)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.allclose(dx, torch.ones(3, 33) @ kept.dense(torch.float32), atol=1e-6)
