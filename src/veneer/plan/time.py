"""How long a recipe takes, without its weights: parts that were measured on two blocks, put together for every
micro-batch of the run as its rows really fill it.

Not counted are the start of the process and what a first step takes more than others.  Weights are read at the disk's
rate, though the system may have them in memory still.  Blocks are counted as if deltas were on all of them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from veneer import machine
from veneer.base.base import Base
from veneer.plan.batch_time import Clock, Ran, facts
from veneer.plan.disk_bandwidth import SAMPLE, read_rate, write_rate
from veneer.plan.io_time import Disk, Needs, paging
from veneer.plan.memory import Estimate
from veneer.plan.meta_model import base_bytes
from veneer.plan.optimizer_timing import optimizer_seconds
from veneer.plan.startup_time import (
    files_to_load,
    hashing_seconds,
    quantizing_seconds,
    restarting_seconds,
    stored_numbers,
)
from veneer.plan.timing_cache import kept
from veneer.recipe.settings import Recipe
from veneer.tasks.base import held_out_batches
from veneer.train.activation_offload import largest_input
from veneer.train.job import BatchPlan, Job, held_out_settings
from veneer.train.restarts import restart_steps

LOADED = 1 << 26
"""Bytes that the rate of loading is measured on."""


@dataclass(frozen=True)
class Times:
    """Seconds, by what they are spent on."""

    steps: list[float]
    """Of each step."""
    evaluation: float
    """Of all measurements of the evaluation loss together."""
    saving: float
    """Of all checkpoints and the adapter."""
    loading: float = 0.0
    quantizing: float = 0.0
    """Of the base, if its quantized weights are not in the cache yet, and of writing them there."""
    restarts: float = 0.0
    """Of all together."""
    disk: Disk = field(default_factory=Disk)
    """Its rates for what is paged."""
    waits: dict[str, float] = field(default_factory=dict)
    """Of a mean step, spent on waiting for the disk, by what is paged."""

    @property
    def parts(self) -> dict[str, float]:
        """What they add up from."""
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


def times(
    recipe: Recipe, rows: Job, order: BatchPlan, found: Estimate, ran: Ran = lambda _: None, room: int | None = None
) -> Times:
    """What the recipe takes here on these rows in this order of steps.

    found   its memory
    ran     is told how many more of `most_runs` are done
    room    bytes that the run may hold; None if unknown
    Measures what is not in the cache.  Raises ModelError and ConfigError as training would.
    """
    folder = next(p for p in [Path(recipe.run).absolute(), *Path(recipe.run).absolute().parents] if p.is_dir())
    clock = Clock(recipe, rows, order, ran)
    stepping = _stepping(clock, found, folder)
    files, fresh = files_to_load(clock.plain)
    rate, paged = read_rate(max(files, key=_size), SAMPLE if recipe.memory.page_weights else LOADED), recipe.memory
    block = base_bytes(clock.model)["blocks"] // clock.blocks if paged.page_weights else 0
    inputs = largest_input(Base(clock.model), rows.examples, order)
    disk, needs = paging(recipe, found, folder, weights=(block, rate), inputs=inputs, room=room)
    steps, waits = _steps(clock, needs, stepping)
    writes = write_rate(folder)
    machine.trim_memory()
    return Times(
        steps,
        _evaluating(clock, needs),
        _saving(recipe, len(order), found) / writes,
        sum(map(_size, files)) / rate,
        _quantizing(clock, writes) if fresh else 0.0,
        _restarting(clock, found.trained),
        disk,
        waits,
    )


def _steps(clock: Clock, needs: Needs, stepping: float) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, and of a mean step's waiting by what is paged."""
    recipe, head = clock.recipe, clock.mean("head")
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


def _stepping(clock: Clock, found: Estimate, folder: Path) -> float:
    paged = bool(found.droppable_bytes)
    like = clock.plain.change(clock.plain.model(2)).named()

    def measure() -> dict[str, float]:
        return {"step": optimizer_seconds(clock.recipe, like, found.trained, folder, paged=paged)}

    about = {"trained": found.trained, "paged": paged, "clip": bool(clock.recipe.train.clip), **facts(clock.plain)}
    return kept(about, measure)["step"]


def _size(file: Path) -> int:
    return file.stat().st_size


def _quantizing(clock: Clock, writes: float) -> float:
    """Of the whole base, and of writing it into the cache with its hash."""
    about = {"quantizing": True, **facts(clock.plain)}
    each = kept(about, lambda: {"number": quantizing_seconds(clock.plain)})["number"]
    hashed = kept({"hashing": True}, lambda: {"byte": hashing_seconds()})["byte"]
    written = base_bytes(clock.model)
    return each * stored_numbers(clock.model) + (written["blocks"] + written["rest"]) * (1 / writes + hashed)


def _restarting(clock: Clock, trained: int) -> float:
    """Of all restarts."""
    steps = len(clock.order)
    count = len(restart_steps(clock.recipe.restarts, steps))
    if not count:
        return 0.0
    about = {"restarts": clock.recipe.restarts.model_dump(mode="json"), "steps": steps, **facts(clock.plain)}
    each = kept(about, lambda: {"number": restarting_seconds(clock.plain, steps)})["number"]
    return count * trained * each


def _evaluating(clock: Clock, needs: Needs) -> float:
    rows, total, every = clock.rows.held_out, len(clock.order), clock.recipe.train.eval_every
    if not rows:
        return 0.0
    often = -(-total // every) if every else 1
    forward, head = clock.forward(needs), clock.mean("head_forward")
    loads = [clock.load(members, rows) for members in held_out_batches(rows, **held_out_settings(clock.recipe))]
    return often * sum(forward(load.work) + head * load.supervised for load in loads)


def _saving(recipe: Recipe, steps: int, found: Estimate) -> float:
    """Bytes of all checkpoints and the adapter."""
    every, kept_ones = recipe.train.checkpoint_every, recipe.train.keep_checkpoints
    often = (steps - 1) // every if every else 0
    return often * found.disk["checkpoints"] / (kept_ones + 1) + found.disk["adapter"]
