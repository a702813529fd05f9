"""The dense storage keeps what it was given."""

import pytest
import torch

from veneer.errors import ModelError
from veneer.storage import from_tensors
from veneer.storage.dense import Dense, DenseConfig


def test_it_is_the_weight_itself() -> None:
    w = torch.randn(4, 6).bfloat16()
    kept = Dense.of(w, DenseConfig())
    assert kept.tensors("m.weight")["m.weight"].data_ptr() == w.data_ptr()
    assert kept.nbytes == 48
    dense = kept.dense(torch.bfloat16)
    dense.zero_()
    assert torch.equal(kept.dense(torch.bfloat16), w), "dense() gave away its own memory"


def test_its_layout_is_one_tensor() -> None:
    w = torch.randn(4, 6)
    assert isinstance(from_tensors({"m.weight": w, "other.weight.absmax": w}, "m.weight"), Dense)
    with pytest.raises(ModelError, match=r"m\.weight: no tensor of this name"):
        Dense.read({}, "m.weight")
    with pytest.raises(ModelError, match=r"\(6,\) torch.float32 is not a floating-point matrix"):
        Dense.of(w[0], DenseConfig())
