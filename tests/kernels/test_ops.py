"""The operators: schema, tracing, gradients; what they compute is tested in test_cpu and test_reference."""

import pytest
import torch
from torch import Tensor

from tests.kernels.weights import dense, packed, tables
from tests.oracles import fourbit as oracle
from veneer.kernels import ops

LEVELS, BOUNDS, ORDER = tables()
MAP = torch.tensor(oracle.dynamic_map(), dtype=torch.float32)


def calls() -> list[tuple[str, tuple[object, ...]]]:
    plain, nested = packed(8, 64), packed(8, 64, 64, nested=True)
    segments = (torch.tensor([0, 1, 3]), torch.tensor([1, -1]))
    return [
        ("quantize_4bit", (torch.randn(4, 33), BOUNDS, ORDER, 32)),
        ("quantize_absmax", (torch.randn(300), 256)),
        ("dequantize_absmax", (torch.randint(0, 256, (300,), dtype=torch.uint8), torch.ones(2), MAP, 0.5, 256)),
        ("dequantize_4bit", (*plain, (8, 64), torch.bfloat16)),
        ("dequantize_4bit", (*nested, (512,), torch.float32)),
        ("matmul_4bit", (torch.randn(2, 3, 64, requires_grad=True), *nested, 8)),
        ("matmul_4bit", (torch.randn(3, 64), *plain, 8)),
        ("matmul_4bit_backward", (torch.randn(3, 8), *plain, 64)),
        ("matmul_4bit_backward", (torch.randn(3, 8, requires_grad=True), *nested, 64)),
        ("lora_segments", (torch.randn(3, 8), torch.randn(2, 4, 8), torch.randn(2, 5, 4), torch.ones(2), *segments)),
    ]


@pytest.mark.parametrize(("name", "arguments"), calls(), ids=[f"{i}-{name}" for i, (name, _) in enumerate(calls())])
def test_schema_fake_and_autograd_registration_agree(name: str, arguments: tuple[object, ...]) -> None:
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.veneer, name), arguments, test_utils=checks)


@pytest.mark.parametrize("cols", [64, 72])
def test_the_gradient_of_x_is_that_of_the_dense_weight(isa: str, cols: int) -> None:
    w = packed(24, cols, 32)
    whole = dense(w, 24, cols, torch.float32)
    x = torch.randn(2, 9, cols, requires_grad=True)
    g = torch.randn(2, 9, 24)
    (got,) = torch.autograd.grad(ops.matmul_4bit(x, w, 24), x, g)
    (want,) = torch.autograd.grad(x @ whole.T, x, g)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("cols", [64, 72])
def test_second_derivatives_are_those_of_the_dense_weight(isa: str, cols: int) -> None:
    w, x = packed(8, cols), torch.randn(3, cols, requires_grad=True)
    dense = ops.dequantize_4bit(w, (8, cols), torch.float32)

    def second(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(ops.matmul_4bit(x, w, 8)), second(x @ dense.T), rtol=1e-3, atol=1e-2)


def test_nothing_flows_to_the_weight_and_nothing_dense_is_kept() -> None:
    w = packed(512, 512)
    x = torch.randn(2, 512, requires_grad=True)
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.matmul_4bit(x, w, 512)
    assert max(kept) == w.codes.numel()
    y.sum().backward()
    assert x.grad is not None
    assert w.absmax.grad is None


def test_no_gradient_is_computed_where_none_is_asked_for() -> None:
    assert not ops.matmul_4bit(torch.randn(1, 64), packed(8, 64), 8).requires_grad


def test_segments_have_gradients_for_x_and_the_adapters() -> None:
    x, a, b = (torch.randn(*s, requires_grad=True) for s in ((4, 6), (2, 3, 6), (2, 5, 3)))
    scale = torch.tensor([0.5, 2.0], requires_grad=True)
    starts, slots = torch.tensor([0, 1, 3, 4]), torch.tensor([1, 0, -1])
    g = torch.randn(4, 5)
    got = torch.autograd.grad(ops.lora_segments(x, a, b, scale, starts, slots), (x, a, b, scale), g)
    rows = [scale[s] * b[s] @ (a[s] @ x[n]) for n, s in enumerate((1, 0, 0))]
    want = torch.autograd.grad(torch.stack([*rows, torch.zeros(5)]), (x, a, b, scale), g)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_traced_graph_holds_the_op() -> None:
    w = packed(8, 64)
    graph = torch.export.export(Linear(w), (torch.randn(2, 64),)).graph_module
    assert "veneer.matmul_4bit" in graph.code


class Linear(torch.nn.Module):
    def __init__(self, w: object) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        return ops.matmul_4bit(x, self.w, 8)  # type: ignore[arg-type]


def test_no_rows_give_no_rows(isa: str) -> None:
    assert ops.matmul_4bit(torch.empty(0, 64), packed(8, 64), 8).shape == (0, 8)
    assert ops.matmul_4bit(torch.empty(2, 0, 64), packed(8, 64), 8).shape == (2, 0, 8)


def test_rows_may_be_strided(isa: str) -> None:
    w, x = packed(8, 64), torch.randn(64, 5)
    assert torch.allclose(ops.matmul_4bit(x.T, w, 8), ops.matmul_4bit(x.T.contiguous(), w, 8), atol=1e-5)
