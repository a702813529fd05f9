"""A claim's trainings: every side at every learning rate with seed 0, then each side's best rate with the other seeds.

Each finished training is a line of a JSONL file; a sweep goes on where that file ends, so it may be stopped any time.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One finished training."""

    claim: str
    side: str
    """What is compared, e.g. "LoRA"."""
    lr: float
    seed: int
    parameters: int
    """Trained numbers."""
    seconds: float
    """In training steps, on a machine that may have done other things too."""
    figures: dict[str, float]
    """What it came to."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Figures on the way, with the `step` of each."""
    commit: str = "unknown"


Train = Callable[[str, float, int], Result]
"""Side, learning rate and seed to a result."""


@dataclass(frozen=True)
class Claim:
    """What is trained and by which figure it is judged."""

    name: str
    sides: Sequence[str]
    rates: Mapping[str, Sequence[float]]
    """Learning rates by side; as many for each."""
    headline: str
    """The figure that chooses a side's rate."""
    train: Train
    lower_is_better: bool = False
    seeds: int = 3

    def best_rate(self, results: Sequence[Result], side: str) -> float:
        """The rate with the best headline over seed 0; the lowest of those equally good."""
        sign = 1 if self.lower_is_better else -1
        tried = [r for r in results if (r.claim, r.side, r.seed) == (self.name, side, 0)]
        return min(tried, key=lambda r: (sign * r.figures[self.headline], r.lr)).lr


def run(claim: Claim, out: Path, minutes: float = float("inf")) -> list[Result]:
    """Make every training that `out` does not hold yet, starting none after so many minutes; all of the claim."""
    ends = time.monotonic() + 60 * minutes
    results = [r for r in read(out) if r.claim == claim.name]
    while time.monotonic() < ends:
        planned = next((p for p in plan(claim, results) if not _is_among(results, *p)), None)
        if planned is None:
            break
        results.append(claim.train(*planned))
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(results[-1])) + "\n")
        print(line_of(results[-1]), file=sys.stderr, flush=True)
    return results


def plan(claim: Claim, results: Sequence[Result]) -> Iterator[tuple[str, float, int]]:
    """Side, rate and seed of every training in order, as far as `results` decides it: sides take turns."""
    for rates in zip(*(claim.rates[side] for side in claim.sides), strict=True):
        yield from ((side, rate, 0) for side, rate in zip(claim.sides, rates, strict=True))
    for seed in range(1, claim.seeds):
        yield from ((side, claim.best_rate(results, side), seed) for side in claim.sides)


def _is_among(results: Sequence[Result], side: str, lr: float, seed: int) -> bool:
    return any((r.side, r.lr, r.seed) == (side, lr, seed) for r in results)


def read(path: Path) -> list[Result]:
    """The results in a file; none if it is not there."""
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def line_of(r: Result) -> str:
    """One result as a line of progress."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in r.figures.items())
    return f"{r.claim}: {r.side} at {r.lr:g}, seed {r.seed}: {figures} ({r.parameters} parameters, {r.seconds:.0f} s)"


def table(claim: Claim, results: Sequence[Result], also: Sequence[str] = ()) -> str:
    """Markdown: a row a side with its best rate, its figures there over the seeds, and seed 0 at every rate."""
    shown = [claim.headline, *also]
    lines = [
        f"| side | parameters | best rate | {' | '.join(shown)} | {claim.headline} at each rate, seed 0 |",
        "| --- | --- | --- |" + " --- |" * (len(shown) + 1),
    ]
    for side in claim.sides:
        mine = sorted((r for r in results if r.side == side), key=lambda r: r.lr)
        if not any(r.seed == 0 for r in mine):
            continue
        best = claim.best_rate(mine, side)
        values = [spread([r.figures[name] for r in mine if r.lr == best]) for name in shown]
        rates = ", ".join(f"{r.lr:g}: {r.figures[claim.headline]:.3f}" for r in mine if r.seed == 0)
        lines.append(f"| {side} | {mine[0].parameters} | {best:g} | {' | '.join(values)} | {rates} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, range and number of values."""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.4g} ({low:.4g} to {high:.4g}, {len(values)} seeds)"
