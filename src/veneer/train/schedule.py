"""What the learning rate is multiplied by at each step: pure functions of the step."""

from collections.abc import Callable
from math import cos, pi

from veneer.registry import Registry

SCHEDULES: Registry[Callable[[float], float]] = Registry("schedule")
"""How the multiplier falls after the warm-up: share of the way gone, in [0, 1] -> multiplier."""


@SCHEDULES.add("constant")
def constant(share: float) -> float:
    """Stays at 1."""
    return 1.0


@SCHEDULES.add("linear")
def linear(share: float) -> float:
    """A straight line to 0."""
    return 1.0 - share


@SCHEDULES.add("cosine")
def cosine(share: float) -> float:
    """Half a cosine to 0."""
    return 0.5 * (1.0 + cos(pi * share))


def multiplier(step: int, *, steps: int, warmup: float, schedule: str) -> float:
    """The multiplier of the learning rate for step `step`, counted from 0.

    1. warm-up: a straight line from 1 / w to 1 over the first w steps; `warmup` below 1 is a share of all steps
    2. then the schedule, from 1 to (but not reaching, while there is a step to make) its end
    """
    w = round(warmup * steps) if warmup < 1 else round(warmup)
    if step < w:
        return (step + 1) / w
    return SCHEDULES[schedule]((step - w) / max(1, steps - w))
