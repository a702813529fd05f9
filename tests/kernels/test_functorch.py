"""Where derivatives are computed in other ways than by backward()."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.kernels.weights import dense, packed
from veneer.kernels import ops
from veneer.kernels.functorch import differentiating

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # in torch's own forward mode
X, T = (torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
Function = Callable[..., Tensor]


def dual(f: Function) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(X, T)))
    assert tangent is not None
    return y, tangent


def forward_over_reverse(f: Function) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        x = X.clone().requires_grad_()
        y = f(forward_ad.make_dual(x, T)).pow(3).sum()
        first, tangent = forward_ad.unpack_dual(torch.autograd.grad(y, x, create_graph=True)[0])
    assert tangent is not None
    return first.detach(), tangent.detach()


def cubed(f: Function) -> Function:
    return lambda x: f(x).pow(3).sum()


WAYS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (T,)),
    "dual": dual,
    "forward over reverse": forward_over_reverse,
    "grad": lambda f: torch.func.grad(cubed(f))(X),
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(cubed(f))(x).square().sum())(X),
    "vmap": lambda f: torch.vmap(f, in_dims=1)(torch.stack([X, T], 1)),
    "grad for each row": lambda f: torch.vmap(torch.func.grad(cubed(f)))(X),
    "jacobian": lambda f: torch.func.jacfwd(f)(X[0]),
    "hessian": lambda f: torch.func.hessian(cubed(f))(X[0]),
    "functionalized": lambda f: torch.func.functionalize(f)(X),
}
"""Each computes something with f (..., 64) -> (..., O)."""


@pytest.mark.parametrize("way", WAYS)
def test_every_derivative_is_that_of_the_dense_weight(isa: str, way: str) -> None:
    w = packed(8, 64, nested=True)
    whole = dense(w, 8, 64, torch.float32)
    got, want = WAYS[way](lambda x: ops.matmul_4bit(x, w, 8)), WAYS[way](lambda x: x @ whole.T)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


SEGMENTS = (torch.tensor([0, 1, 3]), torch.tensor([1, 0]))
ADAPTERS = (
    torch.linspace(-1, 1, 24).view(3, 8),
    torch.linspace(-2, 1, 64).view(2, 4, 8),
    torch.linspace(-1, 2, 40).view(2, 5, 4),
    torch.tensor([0.5, 2.0]),
)


def by_row(x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return torch.stack([scale[s] * b[s] @ (a[s] @ x[n]) for n, s in enumerate((1, 0, 0))])


def segments(*arguments: Tensor) -> Tensor:
    return ops.lora_segments(*arguments, *SEGMENTS)  # type: ignore[call-arg]


def test_segments_have_every_derivative() -> None:
    tangents = tuple(t.cos() for t in ADAPTERS)
    for way in (
        lambda f: torch.func.jvp(f, ADAPTERS, tangents),
        lambda f: torch.func.grad(lambda *given: f(*given).pow(3).sum(), (0, 1, 2, 3))(*ADAPTERS),
        lambda f: torch.vmap(f, (None, None, 0, None))(*ADAPTERS[:2], torch.stack([ADAPTERS[2]] * 2), ADAPTERS[3]),
    ):
        torch.testing.assert_close(way(segments), way(by_row))


def test_where_operators_alone_would_be_wrong() -> None:
    seen = {}

    def look(name: str) -> Function:
        def f(x: Tensor) -> Tensor:
            seen[name] = differentiating()
            return x.sum()

        return f

    look("nowhere")(X)
    look("backward")(X.clone().requires_grad_()).backward()
    torch.func.functionalize(look("functionalize"))(X)
    torch.func.jvp(look("jvp"), (X,), (T,))
    torch.func.grad(look("grad"))(X)
    torch.vmap(look("vmap"))(X)
    torch.func.functionalize(torch.func.grad(look("both")))(X)
    with forward_ad.dual_level():
        look("dual")(X)
    wrong = {"jvp", "grad", "vmap", "both", "dual"}
    assert seen == {name: name in wrong for name in ("nowhere", "backward", "functionalize", *wrong)}
