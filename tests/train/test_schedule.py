"""The multiplier of the learning rate against values worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.train.schedule import SCHEDULES, multiplier

BY_HAND = {
    ("constant", 0): [1, 1, 1, 1],
    ("constant", 2): [1 / 2, 1, 1, 1],
    ("linear", 0): [1, 3 / 4, 2 / 4, 1 / 4],
    ("linear", 2): [1 / 2, 1, 1, 1 / 2],
    ("linear", 0.5): [1 / 2, 1, 1, 1 / 2],  # half of 4 steps
    ("linear", 0.1): [1, 3 / 4, 2 / 4, 1 / 4],  # rounds to none
    ("linear", 4): [1 / 4, 2 / 4, 3 / 4, 1],
    ("linear", 8): [1 / 8, 2 / 8, 3 / 8, 4 / 8],  # longer than the run
    ("cosine", 0): [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5],
    ("cosine", 1): [1, 1, 0.75, 0.25],
}


@pytest.mark.parametrize(("schedule", "warmup"), BY_HAND)
def test_four_steps_by_hand(schedule: str, warmup: float) -> None:
    found = [multiplier(step, steps=4, warmup=warmup, schedule=schedule) for step in range(4)]
    assert found == pytest.approx(BY_HAND[schedule, warmup])


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0, 600), st.sampled_from(list(SCHEDULES)))
def test_no_step_is_without_effect_and_it_rises_then_falls(steps: int, warmup: float, schedule: str) -> None:
    found = [multiplier(step, steps=steps, warmup=warmup, schedule=schedule) for step in range(steps)]
    assert all(0 < m <= 1 for m in found)
    top = max(range(steps), key=lambda i: (found[i], i))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_an_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no schedule 'cosin'. Did you mean 'cosine'.*constant, cosine, linear"):
        multiplier(5, steps=10, warmup=0, schedule="cosin")


JAGGED = {
    0: 1 / 500,
    249: 0.5,
    499: 1.0,
    4999: 0.8869,
    5000: 0.8820 / 100,
    5049: 0.4410,
    5099: 0.8820,
    5100: 0.8820,
    10000: 0.5609 / 100,
    10049: 0.2804,
    10100: 0.5609,
    19999: 0.1,
}
"""A jagged cosine: 20000 steps, warm-up 500, restarts every 5000 with 100 steps of re-warm-up, floor 0.1; the values of
the authors' code, whose rises are one step later because they begin with a step of rate 0."""


@pytest.mark.parametrize("step", JAGGED)
def test_a_jagged_cosine(step: int) -> None:
    found = multiplier(
        step, steps=20000, warmup=500, schedule="cosine", floor=0.1, restarts=[5000, 10000, 15000], rewarm=100
    )
    assert found == pytest.approx(JAGGED[step], abs=6e-5)


def test_eight_steps_with_restarts_by_hand() -> None:
    """A line from 1 at step 0 towards 0.5 at step 8; after step 4 it rises in two steps to where it is at step 6."""
    found = [multiplier(s, steps=8, warmup=0, schedule="linear", floor=0.5, restarts=[4], rewarm=2) for s in range(8)]
    assert found == pytest.approx([1, 15 / 16, 14 / 16, 13 / 16, 10 / 32, 10 / 16, 10 / 16, 9 / 16])


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(1, 100), st.integers(0, 100), st.sampled_from(list(SCHEDULES)))
def test_with_restarts_too_no_step_is_without_effect(steps: int, every: int, rewarm: int, schedule: str) -> None:
    restarts = range(every, steps, every)
    plain = [multiplier(s, steps=steps, warmup=0, schedule=schedule) for s in range(steps)]
    found = [
        multiplier(s, steps=steps, warmup=0, schedule=schedule, restarts=restarts, rewarm=min(rewarm, every))
        for s in range(steps)
    ]
    assert all(0 < f <= p for f, p in zip(found, plain, strict=True))
