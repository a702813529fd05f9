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
from veneer.kernels.fast_path import FastMatmul


def test_it_computes_what_the_op_does(isa: str) -> None:
    w = packed(33, 192, nested=True)
    fast = FastMatmul(w, 33, 192)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((192,), (1, 192), (2, 3, 192), (40, 192)):
            x = torch.randn(shape).to(dtype)
            assert fast.accepts(x) == (isa != "absent")
            if fast.accepts(x):
                assert torch.equal(fast.matmul(x), ops.matmul_4bit(x, w, 33))
    if isa != "absent":
        x = torch.randn(192, 5).bfloat16().T
        assert torch.equal(fast.matmul(x), ops.matmul_4bit(x, w, 33))


def test_it_is_left_alone_where_more_is_asked_for() -> None:
    if native.library() is None:
        pytest.skip("needs the C library")
    fast = FastMatmul(packed(8, 64), 8, 64)
    x = torch.randn(2, 64)
    assert fast.accepts(x)
    assert not fast.accepts(x.clone().requires_grad_())
    with torch.no_grad():
        assert fast.accepts(x.clone().requires_grad_())
    assert not fast.accepts(x.half())
    assert not fast.accepts(x[:, :32])
    assert not fast.accepts(x[:0])
    assert not fast.accepts(x.to("meta"))
    assert not fast.accepts(torch.nn.Parameter(x, requires_grad=False))
    assert not FastMatmul(packed(8, 48), 8, 48).accepts(torch.randn(2, 48)), "D is no multiple of the block"
    with FlopCounterMode(display=False):
        assert not fast.accepts(x), "a mode is watching the ops"
    with forward_ad.dual_level():
        assert not fast.accepts(x), "tangents would be lost"
    with torch.device("meta"):
        assert not fast.accepts(x), "a mode is watching the functions"
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not fast.accepts(x)


def test_numbers_that_are_not_in_memory_as_they_are_meant() -> None:
    w = packed(8, 64)
    fast = FastMatmul(w, 8, 64)
    x = torch.randn(2, 64)
    for given, meant in ((torch._neg_view(x), -x), (torch._efficientzerotensor((2, 64)), torch.zeros(2, 64))):
        assert not fast.accepts(given)
        assert torch.equal(ops.matmul_4bit(given, w, 8), ops.matmul_4bit(meant, w, 8))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_recorded_trace_computes_anew() -> None:
    w = packed(8, 64)
    fast = FastMatmul(w, 8, 64)
    x = torch.randn(2, 64)
    traced = torch.jit.trace(lambda x: fast.matmul(x) if fast.accepts(x) else ops.matmul_4bit(x, w, 8), x)
    assert torch.equal(traced(2 * x), ops.matmul_4bit(2 * x, w, 8))


def test_inference_mode_changes_nothing() -> None:
    w = packed(8, 64)
    fast = FastMatmul(w, 8, 64)
    with torch.inference_mode():
        x = torch.randn(2, 64)
        y = fast.matmul(x) if fast.accepts(x) else ops.matmul_4bit(x, w, 8)
    assert y.is_inference()
    assert torch.equal(y, ops.matmul_4bit(x.clone(), w, 8))


def test_a_transform_sees_the_op() -> None:
    if native.library() is None:
        pytest.skip("needs the C library")
    fast = FastMatmul(packed(8, 64), 8, 64)
    seen = []
    torch.func.grad(lambda x: [seen.append(fast.accepts(x)), x.sum()][1])(torch.randn(64))
    assert seen == [False]


def test_copies_point_to_their_own_memory() -> None:
    w = packed(8, 64)
    fast = FastMatmul(w, 8, 64)
    x = torch.eye(64)
    want = ops.matmul_4bit(x, w, 8)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        w.codes.zero_()
        assert other.w.codes.data_ptr() != w.codes.data_ptr()
        assert not other.accepts(x) or torch.equal(other.matmul(x), want)


def test_a_weight_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="codes has 256 elements"):
        FastMatmul(packed(8, 64), 9, 64)
