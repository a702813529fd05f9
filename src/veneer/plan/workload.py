"""How much there is to compute in a micro-batch, as its rows really fill it, and which ones stand for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.data.example import Example
from veneer.data.pack import Batch, collate

ATTENTION = 3
"""How much longer a multiply-add takes in attention than in a large matrix product, about."""
ALIKE = 1.2
"""Micro-batches whose work differs by no more than this factor are timed as one."""


@dataclass(frozen=True)
class Load:
    """One micro-batch."""

    members: tuple[int, ...]
    work: float
    """Proportional to the multiply-adds of its blocks, padding included."""
    supervised: int
    """Positions that the head is computed at."""


def load_of(members: Sequence[int], examples: Sequence[Example], multiple: int, width: int) -> Load:
    """The load of these examples together, filled up to a multiple, in blocks of this hidden size.

    A block has about 12 width^2 weights; attention pads every document to the longest.
    """
    lengths = [len(examples[i]) for i in members]
    tokens = -(-sum(lengths) // multiple) * multiple
    attention = ATTENTION * len(lengths) * max(lengths) ** 2
    return Load(
        tuple(members), 12 * width * tokens + attention, sum(int(examples[i].supervised[1:].sum()) for i in members)
    )


def representatives(loads: Sequence[Load]) -> list[Load]:
    """The median, if all are alike; else a light and a heavy one."""
    by_work = sorted(set(loads), key=lambda load: (load.work, load.members))
    if by_work[-1].work <= ALIKE * by_work[0].work:
        return [by_work[len(by_work) // 2]]
    tenth = len(by_work) // 10
    return [by_work[tenth], by_work[-1 - tenth]]


def batch_of(load: Load, examples: Sequence[Example], multiple: int) -> Batch:
    """The tensors of a micro-batch."""
    return collate([examples[i] for i in load.members], multiple)


def line_through(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Seconds by work: through two points, or through one and the origin; never below 0, never falling."""
    if len(points) == 1 or points[0][0] == points[1][0]:
        (work, seconds), *_ = points
        return lambda w: seconds * w / work
    (w1, s1), (w2, s2) = points
    slope = max((s2 - s1) / (w2 - w1), 0.0)
    return lambda w: max(s1 + slope * (w - w1), 0.0)
