"""The short way to the library gives the op's own numbers, and is taken only where nothing is lost by it."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.weights import packed
from veneer.errors import InputError
from veneer.kernels import native, ops
from veneer.kernels.fast_path import Direct


def test_it_computes_what_the_op_does(isa: str) -> None:
    w = packed(33, 192, nested=True)
    direct = Direct(w, 33, 192)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((192,), (1, 192), (2, 3, 192), (40, 192)):
            x = torch.randn(shape).to(dtype)
            assert direct.takes(x) == (isa != "absent")
            if direct.takes(x):
                assert torch.equal(direct.matmul(x), ops.matmul_4bit(x, w, 33))
    if isa != "absent":
        x = torch.randn(192, 5).bfloat16().T
        assert torch.equal(direct.matmul(x), ops.matmul_4bit(x, w, 33))


def test_it_is_left_alone_where_more_is_asked_for() -> None:
    if native.library() is None:
        pytest.skip("needs the C library")
    direct = Direct(packed(8, 64), 8, 64)
    x = torch.randn(2, 64)
    assert direct.takes(x)
    assert not direct.takes(x.clone().requires_grad_())
    with torch.no_grad():
        assert direct.takes(x.clone().requires_grad_())
    assert not direct.takes(x.half())
    assert not direct.takes(x[:, :32])
    assert not direct.takes(x[:0])
    assert not direct.takes(x.to("meta"))
    assert not direct.takes(torch.nn.Parameter(x, requires_grad=False))
    assert not Direct(packed(8, 48), 8, 48).takes(torch.randn(2, 48)), "D is no multiple of the block"
    with FlopCounterMode(display=False):
        assert not direct.takes(x), "a mode is watching the ops"
    with forward_ad.dual_level():
        assert not direct.takes(x), "tangents would be lost"
    with torch.device("meta"):
        assert not direct.takes(x), "a mode is watching the functions"
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not direct.takes(x)


def test_numbers_that_are_not_in_memory_as_they_are_meant() -> None:
    w = packed(8, 64)
    direct = Direct(w, 8, 64)
    x = torch.randn(2, 64)
    for given, meant in ((torch._neg_view(x), -x), (torch._efficientzerotensor((2, 64)), torch.zeros(2, 64))):
        assert not direct.takes(given)
        assert torch.equal(ops.matmul_4bit(given, w, 8), ops.matmul_4bit(meant, w, 8))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_recorded_trace_computes_anew() -> None:
    w = packed(8, 64)
    direct = Direct(w, 8, 64)
    x = torch.randn(2, 64)
    traced = torch.jit.trace(lambda x: direct.matmul(x) if direct.takes(x) else ops.matmul_4bit(x, w, 8), x)
    assert torch.equal(traced(2 * x), ops.matmul_4bit(2 * x, w, 8))


def test_inference_mode_changes_nothing() -> None:
    w = packed(8, 64)
    direct = Direct(w, 8, 64)
    with torch.inference_mode():
        x = torch.randn(2, 64)
        y = direct.matmul(x) if direct.takes(x) else ops.matmul_4bit(x, w, 8)
    assert y.is_inference()
    assert torch.equal(y, ops.matmul_4bit(x.clone(), w, 8))


def test_a_transform_sees_the_op() -> None:
    if native.library() is None:
        pytest.skip("needs the C library")
    direct = Direct(packed(8, 64), 8, 64)
    seen = []
    torch.func.grad(lambda x: [seen.append(direct.takes(x)), x.sum()][1])(torch.randn(64))
    assert seen == [False]


def test_copies_point_to_their_own_memory() -> None:
    w = packed(8, 64)
    direct = Direct(w, 8, 64)
    x = torch.eye(64)
    want = ops.matmul_4bit(x, w, 8)
    for other in (copy.deepcopy(direct), pickle.loads(pickle.dumps(direct))):
        w.codes.zero_()
        assert other.w.codes.data_ptr() != w.codes.data_ptr()
        assert not other.takes(x) or torch.equal(other.matmul(x), want)


def test_a_weight_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="codes hold 256 elements"):
        Direct(packed(8, 64), 9, 64)
