"""Small frozen layers for the tests of methods, and what every such test asks of a delta."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layer_view import frozen_layer
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig


def linear(d: int, o: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A linear layer with drawn weights (PyTorch's own spread)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(d, o, bias=bias).requires_grad_(False)


def layer_of(module: nn.Module) -> FrozenLayer:
    layer = frozen_layer(module, blocks=True)
    assert layer is not None
    return layer


def delta_on(module: nn.Module, config: MethodConfig, *, seed: int = 0) -> Any:
    """A new delta of the config's method on a module."""
    return METHODS[config.method](layer_of(module), config, torch.Generator().manual_seed(seed))


def moved(delta: Delta, spread: float = 0.5, seed: int = 1) -> Any:
    """The delta with noise added to every parameter, so that it is no longer at its start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0.0, spread, generator=rng))
    return delta


def rows(*shape: int, seed: int = 2) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


def through(module: nn.Module, delta: Delta, x: Tensor) -> Tensor:
    """What the layer and its delta make of x together."""
    x = delta.before(x)
    changed: Tensor = delta(x, module(x))
    return changed


def folded(module: nn.Module, delta: Delta, x: Tensor) -> Tensor:
    """What the layer alone makes of x with the delta folded into weight and bias; linear layers only."""
    layer = layer_of(module)
    bias = None if layer.bias is None else delta.fold_bias(layer.bias())
    return nn.functional.linear(x, delta.fold(layer.weight()), bias)


def learns_in_two_steps(module: nn.Module, delta: Delta, x: Tensor) -> bool:
    """Whether every parameter has a gradient at the second step of descent."""
    step = torch.optim.SGD(delta.parameters(), 0.1)
    for _ in range(2):
        step.zero_grad()
        through(module, delta, x).square().sum().backward()
        step.step()
    return all(p.grad is not None and bool(torch.count_nonzero(p.grad)) for p in delta.parameters())


def gradients_hold(make: Callable[[], tuple[nn.Module, Delta]], x: Tensor) -> bool:
    """Whether autograd agrees with finite differences, in float64, for every parameter and the input."""
    module, delta = make()
    module, delta = module.double(), delta.double()
    names = [name for name, _ in delta.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        parts = dict(zip(names, values, strict=True))
        x = torch.func.functional_call(_Before(delta), {f"delta.{k}": v for k, v in parts.items()}, (x,))
        out: Tensor = torch.func.functional_call(delta, parts, (x, module(x)))
        return out

    values = [p.detach().clone().requires_grad_() for p in delta.parameters()]
    return torch.autograd.gradcheck(run, (x.double().requires_grad_(), *values))


class _Before(nn.Module):
    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.before(x)
