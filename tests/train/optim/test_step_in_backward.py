"""Gradients used as soon as they are whole: the bits of an ordinary step, and no more than one gradient alive."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import prepared
from tests.train.optim.test_adamw import EIGHT, SETTINGS, shapes
from veneer.errors import ConfigError, TrainingError
from veneer.recipe.settings import OptimizerSettings, Recipe
from veneer.train.optim import build_optimizer
from veneer.train.optim.adamw import FlatAdamW
from veneer.train.optim.step_in_backward import StepInBackward

Make = Callable[..., Recipe]


def loss_of(parameters: list[Tensor], step: int) -> Tensor:
    return sum(((p * (step + 1.5)).sin().sum() * (i + 1) for i, p in enumerate(parameters)), torch.zeros(()))


@pytest.mark.parametrize("settings", [SETTINGS, EIGHT], ids=["32 bits", "8 bits"])
@pytest.mark.parametrize("paged", [False, True])
def test_it_steps_as_with_all_gradients_kept(settings: OptimizerSettings, paged: bool, tmp_path: Any) -> None:
    ours, kept = shapes(), shapes()
    more = {"in_backward": True, "paged": paged}
    optimizer = build_optimizer(ours, settings.model_copy(update=more), tmp_path)
    ordinary = build_optimizer(kept, settings)
    assert isinstance(optimizer, FlatAdamW) and optimizer.step_in_backward is not None
    assert optimizer.flat.gradients.numel() == 0
    for step in range(3):
        optimizer.step_in_backward.begin()
        with optimizer.step_in_backward.stepping():
            loss_of([n.parameter for n in ours], step).backward()  # type: ignore[no-untyped-call]
        assert all(n.parameter.grad is None for n in ours)
        optimizer.step()
        ordinary.zero_grad()
        loss_of([n.parameter for n in kept], step).backward()  # type: ignore[no-untyped-call]
        ordinary.step()
    for a, b in zip(ours, kept, strict=True):
        assert torch.equal(a.parameter, b.parameter)
        mine, theirs = optimizer.state[a.parameter], ordinary.state[b.parameter]
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs) and int(mine["step"]) == 3


def test_never_more_than_one_gradient_is_alive() -> None:
    parameters = [nn.Parameter(torch.ones(50, 50)) for _ in range(6)]
    alive: list[int] = []
    stepped: list[int] = []

    def step(index: int, gradient: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in parameters))
        stepped.append(index)

    at_once = StepInBackward(parameters, step)
    x = torch.ones(50, 50)
    for p in parameters:
        x = torch.tanh(x @ p)
    with at_once.stepping():
        x.sum().backward()  # type: ignore[no-untyped-call]
    assert stepped == [5, 4, 3, 2, 1, 0] and set(alive) == {1}


def test_what_several_passes_left_is_used_once_and_whole() -> None:
    used: list[tuple[int, float]] = []
    tied, below = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    at_once = StepInBackward([tied, below], lambda index, gradient: used.append((index, float(gradient.sum()))))
    for _ in range(2):  # the head, in two chunks
        tied.sum().backward()  # type: ignore[no-untyped-call]
    assert not used
    with at_once.measuring():
        pass
    assert not used and tied.grad is None
    assert float(at_once.norms[tied]) == pytest.approx(2 * 3**0.5)
    at_once.begin()
    assert not at_once.norms
    tied.sum().backward()  # type: ignore[no-untyped-call]
    with at_once.stepping(torch.tensor(0.5)):
        (tied * 2).sum().backward()  # type: ignore[no-untyped-call]
        assert used == [(0, 4.5)], "0.5 * 3 * (1 + 2)"
        below.grad = torch.ones(3)  # left by another pass
    assert used == [(0, 4.5), (1, 1.5)]


def test_a_missing_gradient_and_one_that_is_not_finite() -> None:
    named = shapes()
    optimizer = build_optimizer(named, SETTINGS.model_copy(update={"in_backward": True}))
    assert isinstance(optimizer, FlatAdamW) and optimizer.step_in_backward is not None
    named[0].parameter.grad = torch.ones(8, 64)
    with pytest.raises(TrainingError, match="2 of 3 parameters have no gradient to step with"):
        optimizer.step()
    before = named[0].parameter.detach().clone()
    with (
        pytest.raises(TrainingError, match=r"norm of a gradient is inf, and other.*go on from the last checkpoint"),
        optimizer.step_in_backward.stepping(),
    ):
        (named[0].parameter * float("inf")).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(before, named[0].parameter)


def test_what_cannot_be_used_at_once_is_refused(job: Make) -> None:
    at_once = {"optimizer": {"in_backward": True}}
    with pytest.raises(
        ConfigError,
        match=r"adds up those of \d+ micro-batches; raise train.micro_batch_tokens, or lower "
        r"train.tokens_per_step \(256\)",
    ):
        prepared(job(**at_once))
    with pytest.raises(ConfigError, match=r"of \d+ micro-batches; set data.packing to true, or lower"):
        prepared(job(**at_once, **{"data.packing": False, "train.micro_batch_tokens": 512}))
    with pytest.raises(ConfigError, match=r"keeps no gradients, but adalora uses all of them"):
        prepared(job(**at_once, **{"method": {"name": "adalora"}, "train.micro_batch_tokens": 512}))
