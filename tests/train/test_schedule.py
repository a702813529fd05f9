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
