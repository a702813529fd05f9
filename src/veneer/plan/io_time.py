"""What paging waits for: bytes that have to pass between memory and disk, held against the rates that were measured.

A block is computed while the next one's weights are read and an earlier one's input is written: it takes at least as
long as that.  One disk serves all, so what goes on at the same time adds up.
"""

from dataclasses import dataclass
from pathlib import Path

from veneer.plan.disk_bandwidth import scratch_rates
from veneer.plan.memory import Estimate
from veneer.recipe.settings import Recipe
from veneer.train.optim.paged_state import SHORT
from veneer.units import format_bytes, format_seconds

SLOW = 0.5
"""Share of a step that is spent on waiting, above which the disk is called slow."""
STATE = 1 << 24
"""Bytes that optimizer state is measured with at a time."""


@dataclass(frozen=True)
class Disk:
    """Bytes a second, of what a recipe pages; None where it pages nothing of the kind."""

    read: float | None = None
    write: float | None = None


@dataclass(frozen=True)
class Needs:
    """Seconds that the disk is busy for one block, and for the optimizer's state once a step."""

    weights: float = 0.0
    """In each direction."""
    written: float = 0.0
    """Its input, in the forward pass."""
    read: float = 0.0
    """Its input again, in the backward pass."""
    state: float = 0.0

    @property
    def forward(self) -> float:
        return self.weights + self.written

    @property
    def backward(self) -> float:
        return self.weights + self.read


def paging(
    recipe: Recipe, found: Estimate, folder: Path, *, weights: tuple[float, float], inputs: int, room: int | None
) -> tuple[Disk, Needs]:
    """The rates of what the recipe pages, measured now, and what they come to.

    folder     where the run is
    weights    bytes of a block's paged weights, 0 if they are not paged, and the rate at which they are read
    inputs     bytes of a block's input
    room       bytes that the run may hold: state that has room stays in memory; None if unknown
    """
    block, rate = weights
    reads, writes, needs = [rate] if block else [], [], {"weights": block / rate if block else 0.0}
    if recipe.memory.page_activations:
        write, read = scratch_rates(folder, inputs)
        reads, writes = [*reads, read], [write]
        needs |= {"written": inputs / write, "read": inputs / read}
    if out := _state_without_room(found, room):
        write, read = scratch_rates(folder, STATE)
        reads, writes = [*reads, read], [*writes, write]
        needs["state"] = out / write + out / read
    return Disk(min(reads) if reads else None, min(writes) if writes else None), Needs(**needs)


def _state_without_room(found: Estimate, room: int | None) -> int:
    """Bytes of paged optimizer state that leave memory and come back in every step."""
    state = found.disk.get("paged optimizer state", 0)
    return 0 if room is None else min(state, max(found.peak_bytes + state + SHORT - room, 0))


def slow_disk(recipe: Recipe, disk: Disk, waits: dict[str, float], seconds: float) -> list[str]:
    """A warning where waiting takes most of a step of so many seconds, with what would help; else none."""
    waiting = sum(waits.values())
    if waiting <= SLOW * seconds:
        return []
    rates = {"reads": disk.read, "writes": disk.write}
    moved = " and ".join(f"{verb} {format_bytes(rate)}" for verb, rate in rates.items() if rate is not None)
    parts = ", ".join(f"{format_seconds(s)} for {what}" for what, s in waits.items() if s > 0)
    helps = {
        "weights": "larger micro-batches (train.micro_batch_tokens), which read the weights less often, or "
        "memory.page_weights false",
        "activations": "memory.page_activations false",
        "optimizer state": "optimizer.bits 8" if recipe.optimizer.bits == 32 else "a lower method.rank",
    }
    worst = max(waits, key=lambda what: waits[what])
    return [
        f"the disk is slow for this: it {moved} a second, so {format_seconds(waiting)} of a step's "
        f"{format_seconds(seconds)} are spent on waiting for it ({parts}). It works, slowly; what would help: a faster "
        f"disk, {helps[worst]}"
    ]
