"""Estimate how long a recipe takes: seconds timed on two blocks, extrapolated to every micro-batch of the run.

Not counted are the start of the process, and what a first step takes more than others.  Weights count as read at the
disk's rate, though they may be in the page cache.  Blocks count as if deltas were on all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from veneer import machine
from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.disk.readahead import BUFFERS
from veneer.plan.disk import SAMPLE, Disk, Needs, paging, read_rate, write_rate
from veneer.plan.memory import Estimate
from veneer.plan.meta_model import base_bytes, files_to_load, short_model
from veneer.plan.timing import (
    RUNS,
    Pieces,
    cached,
    facts,
    optimizer_seconds,
    pieces,
    quantizing_seconds,
    restart_seconds,
)
from veneer.recipe.settings import Recipe
from veneer.storage.layers import Stored
from veneer.tasks.base import held_out_batches
from veneer.tasks.causal_lm import ROUND
from veneer.train.activation_checkpointing import chosen_blocks
from veneer.train.activation_offload import largest_input
from veneer.train.job import held_out_settings
from veneer.train.preflight import Checked
from veneer.train.restarts import restart_steps

LOADED = 1 << 26
"""Bytes on which the rate of loading is measured."""
ATTENTION = 3
"""How much longer a multiply-add takes in attention than in a large matrix product, about."""
ALIKE = 1.2
"""Micro-batches whose work differs by no more than this factor are timed as one."""
Ran = Callable[[int], None]


@dataclass(frozen=True)
class Load:
    """How much there is to compute in one micro-batch."""

    members: tuple[int, ...]
    work: float
    """Proportional to the multiply-adds of its blocks, padding included."""
    supervised: int
    """Positions at which the head is computed."""

    @classmethod
    def of(cls, members: Sequence[int], examples: Sequence[Example], multiple: int, width: int) -> "Load":
        """The load of these examples, padded to a multiple, in blocks of this hidden size.

        A block has about 12 width^2 weights; attention pads every document to the longest.
        """
        lengths = [len(examples[i]) for i in members]
        tokens = -(-sum(lengths) // multiple) * multiple
        work = 12 * width * tokens + ATTENTION * len(lengths) * max(lengths) ** 2
        return cls(tuple(members), work, sum(int(examples[i].supervised[1:].sum()) for i in members))


@dataclass(frozen=True)
class Times:
    """Seconds, by what they are spent on."""

    steps: list[float]
    """Each step."""
    evaluation: float
    """All evaluations of the held-out loss together."""
    saving: float
    """All checkpoints and the adapter."""
    loading: float = 0.0
    quantizing: float = 0.0
    """The base, and writing it to the cache, if it is not there yet."""
    restarts: float = 0.0
    """All together."""
    disk: Disk = field(default_factory=Disk)
    """Its rates for what is paged."""
    waits: dict[str, float] = field(default_factory=dict)
    """Of a mean step, waiting for the disk, by what is paged."""

    @property
    def parts(self) -> dict[str, float]:
        """The summands of `total`."""
        return {
            "loading": self.loading,
            "quantizing": self.quantizing,
            "training": sum(self.steps),
            "restarts": self.restarts,
            "evaluation": self.evaluation,
            "saving": self.saving,
        }

    @property
    def seconds_a_step(self) -> float:
        return sum(self.steps) / len(self.steps)

    @property
    def waiting(self) -> float:
        return sum(self.waits.values())

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def times(checked: Checked, found: Estimate, ran: Ran = lambda _: None, room: int | None = None) -> Times:
    """How long the job takes here.

    found   its memory
    ran     is told of every run of a micro-batch, of at most `most_runs`
    room    bytes that the run may hold; None if unknown
    Measures what is not in the cache.
    """
    recipe, job = checked.recipe, checked.job
    folder = next(p for p in [Path(recipe.run).absolute(), *Path(recipe.run).absolute().parents] if p.is_dir())
    clock = Clock(checked, ran)
    stepping = _stepping(checked, found, folder)
    files, to_quantize = files_to_load(checked)
    rate = read_rate(max(files, key=_size), SAMPLE if recipe.memory.page_weights else LOADED)
    block = base_bytes(checked.meta)["blocks"] // clock.blocks if recipe.memory.page_weights else 0
    inputs = largest_input(checked.meta, job.examples, job.steps)
    disk, needs = paging(recipe, found, folder, weights=(block, rate), inputs=inputs, room=room)
    steps, waits = _steps(clock, needs, stepping)
    writes = write_rate(folder)
    machine.trim_memory()
    return Times(
        steps,
        _evaluating(clock, needs),
        _saved_bytes(checked, found) / writes,
        sum(map(_size, files)) / rate,
        _quantizing(checked, writes) if to_quantize else 0.0,
        _restarting(checked),
        disk,
        waits,
    )


class Clock:
    """Seconds of a job's micro-batches, from the few that are timed."""

    def __init__(self, checked: Checked, ran: Ran) -> None:
        self.checked, self._ran = checked, ran
        job, recipe = checked.job, checked.recipe
        self.blocks = len(checked.meta.blocks)
        again = len(chosen_blocks(checked.meta, recipe.train.recompute))
        self.counts = {recomputed: n for recomputed, n in ((False, self.blocks - again), (True, again)) if n}
        self.multiple = ROUND if recipe.data.packing else 1
        loads = {tuple(m): self.load(m, job.examples) for step in job.steps for m in step}
        self.loads = [[loads[tuple(m)] for m in step] for step in job.steps]
        self.chosen = representatives(list(loads.values()))
        self.measured = [{kind: self._pieces(load, kind) for kind in self.counts} for load in self.chosen]

    def load(self, members: Sequence[int], examples: Sequence[Example]) -> Load:
        """The load of these examples together."""
        return Load.of(members, examples, self.multiple, self.checked.meta.hidden_size)

    def _pieces(self, load: Load, recompute: bool) -> Pieces:
        batch = collate([self.checked.job.examples[i] for i in load.members], self.multiple)
        lengths = [batch.starts.tolist(), [len(batch.targets)]]

        def measure() -> dict[str, float]:
            return asdict(pieces(self.checked, batch, recompute, self._ran))

        return Pieces(**cached({"batch": lengths, "recomputed": recompute, **facts(self.checked)}, measure))

    def _sum(self, seconds: Callable[[dict[bool, Pieces]], float]) -> Callable[[float], float]:
        """A line through what was measured: work -> seconds."""
        return line_through([(load.work, seconds(p)) for load, p in zip(self.chosen, self.measured, strict=True)])

    def body(self, needs: Needs) -> Callable[[float], float]:
        """Work -> seconds of all blocks, forward and backward, each at least as long as the disk needs for it."""
        waits = max(1 - BUFFERS / self.blocks, 0.0)  # blocks in the buffers when the direction turns are read already

        def seconds(found: dict[bool, Pieces]) -> float:
            inside = 0.0
            for kind, n in self.counts.items():
                for taken, least in ((found[kind].forward, needs.forward), (found[kind].backward, needs.backward)):
                    inside += n * (waits * max(taken, least) + (1 - waits) * taken)
            return min(p.outside for p in found.values()) + inside

        return self._sum(seconds)

    def forward(self, needs: Needs) -> Callable[[float], float]:
        """Work -> seconds without a gradient."""
        return self._sum(
            lambda found: min(p.outside + self.blocks * max(p.forward, needs.weights) for p in found.values())
        )

    def mean(self, name: str) -> float:
        """A piece that does not depend on the work."""
        values = [getattr(p, name) for found in self.measured for p in found.values()]
        return float(sum(values) / len(values))


def most_runs(recipe: Recipe) -> int:
    """How often a micro-batch may be timed."""
    return 2 * (1 + RUNS) * (1 if isinstance(recipe.train.recompute, bool) else 2)


def representatives(loads: Sequence[Load]) -> list[Load]:
    """The median load if all are alike; else a light and a heavy one."""
    by_work = sorted(set(loads), key=lambda load: (load.work, load.members))
    if by_work[-1].work <= ALIKE * by_work[0].work:
        return [by_work[len(by_work) // 2]]
    tenth = len(by_work) // 10
    return [by_work[tenth], by_work[-1 - tenth]]


def line_through(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Seconds by work: through two points, or through one and the origin; never below 0, never falling."""
    if len(points) == 1 or points[0][0] == points[1][0]:
        (work, seconds), *_ = points
        return lambda w: seconds * w / work
    (w1, s1), (w2, s2) = points
    slope = max((s2 - s1) / (w2 - w1), 0.0)
    return lambda w: max(s1 + slope * (w - w1), 0.0)


def _steps(clock: Clock, needs: Needs, stepping: float) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, and of a mean step's waiting by what is paged."""
    recipe, head = clock.checked.recipe, clock.mean("head")
    passes = 2 if recipe.optimizer.in_backward and recipe.train.clip else 1
    beside = clock.mean("change") * clock.blocks + max(stepping, needs.state)

    def all_steps(needs: Needs) -> list[float]:
        body = clock.body(needs)
        return [
            beside + passes * sum(body(load.work) + head * load.supervised for load in loads) for loads in clock.loads
        ]

    alone, weights, both = (all_steps(n) for n in (Needs(), Needs(weights=needs.weights), needs))
    count = len(both)
    waits = {
        "weights": (sum(weights) - sum(alone)) / count,
        "activations": (sum(both) - sum(weights)) / count,
        "optimizer state": max(needs.state - stepping, 0.0),
    }
    return both, {what: seconds for what, seconds in waits.items() if seconds > 0}


def _stepping(checked: Checked, found: Estimate, folder: Path) -> float:
    paged, recipe = bool(found.droppable_bytes), checked.recipe
    like = short_model(checked, 2)[1].named()

    def measure() -> dict[str, float]:
        return {"step": optimizer_seconds(recipe, like, found.trained, folder, paged=paged)}

    about = {"trained": found.trained, "paged": paged, "clip": bool(recipe.train.clip), **facts(checked)}
    return cached(about, measure)["step"]


def _size(file: Path) -> int:
    return file.stat().st_size


def _quantizing(checked: Checked, writes: float) -> float:
    """Quantize the whole base and write it to the cache."""
    each = cached({"quantizing": True, **facts(checked)}, lambda: {"number": quantizing_seconds(checked)})["number"]
    shapes = [m.storage.shape for m in checked.meta.network.modules() if isinstance(m, Stored)]
    written = base_bytes(checked.meta)
    return each * sum(rows * columns for rows, columns in shapes) + (written["blocks"] + written["rest"]) / writes


def _restarting(checked: Checked) -> float:
    """All restarts."""
    settings, steps = checked.recipe.restarts, len(checked.job.steps)
    if not (count := len(restart_steps(settings, steps))):
        return 0.0
    about = {"restarts": settings.model_dump(mode="json"), "steps": steps, **facts(checked)}
    each = cached(about, lambda: {"number": restart_seconds(checked)})["number"]
    return count * checked.adapter.n_params() * each


def _evaluating(clock: Clock, needs: Needs) -> float:
    recipe, rows, total = clock.checked.recipe, clock.checked.job.held_out, len(clock.checked.job.steps)
    if not rows:
        return 0.0
    often = -(-total // recipe.train.eval_every) if recipe.train.eval_every else 1
    forward, head = clock.forward(needs), clock.mean("head_forward")
    loads = [clock.load(members, rows) for members in held_out_batches(rows, **held_out_settings(recipe))]
    return often * sum(forward(load.work) + head * load.supervised for load in loads)


def _saved_bytes(checked: Checked, found: Estimate) -> float:
    """Bytes of all checkpoints and the adapter."""
    every, kept = checked.recipe.train.checkpoint_every, checked.recipe.train.keep_checkpoints
    often = (len(checked.job.steps) - 1) // every if every else 0
    return often * found.disk["checkpoints"] / (kept + 1) + found.disk["adapter"]
