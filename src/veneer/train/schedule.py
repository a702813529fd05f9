"""What the learning rate is multiplied by at each step: pure functions of the step."""

from collections.abc import Callable, Sequence
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


def multiplier(
    step: int,
    *,
    steps: int,
    warmup: float,
    schedule: str,
    floor: float = 0.0,
    restarts: Sequence[int] = (),
    rewarm: int = 0,
) -> float:
    """The multiplier of the learning rate for step `step`, counted from 0.

    1. warm-up: a straight line from 1 / w to 1 over the first w steps; `warmup` below 1 is a share of all steps
    2. then the schedule, from 1 to (but not reaching, while there is a step to make) its end; a falling one ends at
       `floor`
    3. after each of `restarts` (steps done before it, rising) a straight line again, over `rewarm` steps, up to where
       the schedule is by then

    3. makes a cosine ReLoRA's "jagged" one (arXiv:2307.05695, figure 2; `cosine_restarts` in the authors' code, whose
    every rise begins with a step of rate 0; here it begins at 1 / rewarm).
    """
    w = warmup_steps(warmup, steps)
    if step < w:
        return (step + 1) / w
    last = max((r for r in restarts if r <= step), default=None)
    rising = last is not None and step - last < rewarm
    at = min(last + rewarm, steps - 1) if last is not None and rising else step
    value = floor + (1 - floor) * SCHEDULES[schedule]((at - w) / max(1, steps - w))
    return value * (step - last + 1) / rewarm if last is not None and rising else value


def warmup_steps(warmup: float, steps: int) -> int:
    """The steps of the first warm-up; below 1 it is a share of all `steps`."""
    return round(warmup * steps) if warmup < 1 else round(warmup)
