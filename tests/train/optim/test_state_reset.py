"""What a restart leaves of the moments, counted; zero is zero, and magnitude keeps the largest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim import OPTIMIZERS
from veneer.train.optim.state_reset import StatefulOptimizer, reset_


def stepped(kind: Any = torch.optim.AdamW, **settings: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """An optimizer after two steps on a matrix and a vector."""
    rng = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(40, 50, generator=rng)), nn.Parameter(torch.randn(30, generator=rng))]
    optimizer = kind(parameters, lr=0.01, **settings)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    return optimizer, list(parameters)


def moments(optimizer: torch.optim.Optimizer, p: Tensor) -> tuple[Tensor, Tensor]:
    state = optimizer.state[p]
    return state["exp_avg"], state["exp_avg_sq"]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_zero_is_zero_and_the_step_count_stays() -> None:
    optimizer, parameters = stepped()
    before = [p.detach().clone() for p in parameters]
    assert reset_(optimizer, parameters, "zero", 0.1, rng()) == 1.0
    for p in parameters:
        assert not any(bool(m.any()) for m in moments(optimizer, p))
        assert optimizer.state[p]["step"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_none_keeps_all() -> None:
    optimizer, parameters = stepped()
    before = [m.clone() for p in parameters for m in moments(optimizer, p)]
    assert reset_(optimizer, parameters, "none", 0.1, rng()) == 0.0
    assert all(
        torch.equal(a, b) for a, b in zip(before, (m for p in parameters for m in moments(optimizer, p)), strict=True)
    )


@pytest.mark.parametrize("keep", [0.1, 0.01, 0.5])
def test_magnitude_keeps_the_largest_and_no_more(keep: float) -> None:
    optimizer, parameters = stepped()
    before = {p: [m.clone() for m in moments(optimizer, p)] for p in parameters}
    reset_(optimizer, parameters, "magnitude", keep, rng())
    for p in parameters:
        first, second = moments(optimizer, p)
        count = max(1, round(keep * p.numel()))
        kept = first != 0
        assert int(kept.sum()) == count
        assert torch.equal(kept, second != 0)
        old = before[p][0].abs()
        assert old[kept].min() > old[~kept].max()
        for new, was in zip((first, second), before[p], strict=True):
            assert torch.equal(new[kept], was[kept])


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_random_keeps_about_its_share_of_the_same_entries_in_both_moments(keep: float) -> None:
    optimizer, parameters = stepped()
    pruned = reset_(optimizer, parameters, "random", keep, rng())
    first, second = moments(optimizer, parameters[0])
    n = first.numel()
    kept = int((first != 0).sum())
    assert abs(kept - keep * n) < 5 * (keep * (1 - keep) * n) ** 0.5  # five standard deviations of the binomial
    assert torch.equal(first != 0, second != 0)
    counts = [int((m == 0).sum()) for p in parameters for m in moments(optimizer, p)]
    assert pruned == sum(counts) / (2 * sum(p.numel() for p in parameters))
    again, others = stepped()
    reset_(again, others, "random", keep, rng())
    assert torch.equal(first, moments(again, others[0])[0])


def test_an_optimizer_before_its_first_step_has_nothing_to_prune() -> None:
    p = nn.Parameter(torch.ones(3))
    assert reset_(torch.optim.AdamW([p]), [p], "zero", 0.1, rng()) == 0.0


def test_momentum_alone_is_pruned_too() -> None:
    optimizer, parameters = stepped(torch.optim.SGD, momentum=0.9)
    reset_(optimizer, parameters, "magnitude", 0.1, rng())
    assert int((optimizer.state[parameters[0]]["momentum_buffer"] != 0).sum()) == 200


def test_factored_moments_can_only_be_zeroed() -> None:
    optimizer, parameters = stepped(torch.optim.Adafactor)
    with pytest.raises(
        ConfigError, match=r"reset magnitude needs one number .* Adafactor keeps .*row_var.*; use reset zero"
    ):
        reset_(optimizer, parameters, "magnitude", 0.1, rng())
    assert reset_(optimizer, parameters, "zero", 0.1, rng()) == 1.0


class InBytes(torch.optim.SGD):
    """Keeps a moment as whole numbers whose zero is 7: pruning has to go through the optimizer."""

    def __init__(self, p: Tensor) -> None:
        super().__init__([p], lr=0.1)
        self.codes = torch.arange(10, dtype=torch.uint8)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        return {"first": self.codes.float() - 7}

    def put_moments_(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        self.codes = (moments["first"] + 7).to(torch.uint8)


def test_an_optimizer_with_another_form_of_moments_takes_them_back_in_it() -> None:
    p = nn.Parameter(torch.ones(10))
    optimizer = InBytes(p)
    assert reset_(optimizer, [p], "magnitude", 0.2, rng()) == 0.8
    assert optimizer.codes.tolist() == [0, 1, 7, 7, 7, 7, 7, 7, 7, 7]
    reset_(optimizer, [p], "zero", 0.2, rng())
    assert set(optimizer.codes.tolist()) == {7}


@pytest.mark.parametrize("bits", [32, 8])
def test_our_own_adamw_in_32_and_in_8_bits(bits: int) -> None:
    """What stays keeps its value to the bit; what goes is 0, whatever code stands for it."""
    rng_ = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(40, 50, generator=rng_))
    optimizer = OPTIMIZERS["adamw"](
        [{"params": [p], "role": "in", "lr": 0.01, "weight_decay": 0.0}], OptimizerSettings(bits=bits), None
    )
    for _ in range(2):
        p.grad = torch.randn(p.shape, generator=rng_)
        optimizer.step()
    assert isinstance(optimizer, StatefulOptimizer)
    before = optimizer.moments(p)
    reset_(optimizer, [p], "magnitude", 0.1, rng())
    after = optimizer.moments(p)
    first = next(iter(after.values()))
    assert int((first != 0).sum()) == 200
    for name, moment in after.items():
        assert torch.equal(moment, torch.where(first != 0, before[name], 0))
    assert reset_(optimizer, [p], "zero", 0.1, rng()) == 1.0
    assert not any(bool(m.any()) for m in optimizer.moments(p).values())
