"""How fast the disk is, past the page cache, and how long a step waits for what it pages.

A block is computed while the next one's weights are read and an earlier one's input is written, so it takes at least as
long as both.  One disk serves all of them: what goes on at the same time adds up.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from veneer.disk.readahead import CHUNK, Range, ReadAhead
from veneer.disk.scratch import open_scratch
from veneer.plan.memory import Estimate
from veneer.recipe.settings import Recipe
from veneer.train.activation_offload import ActivationFile
from veneer.train.optim.paged_state import SHORT
from veneer.units import format_bytes, format_seconds

SAMPLE = 1 << 28
"""Bytes that are read at most."""
WRITTEN = 1 << 25
"""Bytes that are written and freed."""
AT_MOST = 16
"""Tensors."""
SLOW = 0.5
"""The disk is called slow if a step waits for it longer than this share of its time."""
STATE = 1 << 24
"""Bytes of optimizer state that are moved at a time when its rate is measured."""


@dataclass(frozen=True)
class Disk:
    """Bytes a second of what a recipe pages; None if it pages nothing in this direction."""

    read: float | None = None
    write: float | None = None


@dataclass(frozen=True)
class Needs:
    """Seconds that the disk is busy for one block, and once a step for the optimizer state."""

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


def read_rate(file: Path, most: int = SAMPLE) -> float:
    """Bytes a second from the middle of a file, through `ReadAhead`; at most `most` bytes are read."""
    size = file.stat().st_size
    count = min(size, most) // CHUNK or 1
    start = max(size - count * CHUNK, 0) // 2
    parts = [[Range(file, start + i * CHUNK, min(CHUNK, size))] for i in range(count)]
    reader = ReadAhead(parts)
    began = time.perf_counter()
    for number in range(count):
        reader.take(number, returns=False)
    return sum(r.nbytes for part in parts for r in part) / (time.perf_counter() - began)


def write_rate(folder: Path) -> float:
    """Bytes a second into a scratch file in `folder`, until they are on the disk."""
    handle, data = open_scratch(folder), os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        for _ in range(WRITTEN // len(data)):
            os.write(handle, data)
        os.fsync(handle)
        return WRITTEN / (time.perf_counter() - began)
    finally:
        os.close(handle)


def scratch_rates(folder: Path, nbytes: int) -> tuple[float, float]:
    """Bytes a second written to and read from a scratch file in `folder`, offloaded activations of `nbytes` each."""
    count = min(max(2, WRITTEN // nbytes), AT_MOST)
    file, data = ActivationFile(folder, count, nbytes), torch.zeros(nbytes // 4)
    hooks = file.saving()
    try:
        began = time.perf_counter()
        kept = [hooks.pack_hook(data) for _ in range(count)]
        file.settle()
        written = time.perf_counter()
        for one in reversed(kept):
            hooks.unpack_hook(one)
        return count * nbytes / (written - began), count * nbytes / (time.perf_counter() - written)
    finally:
        file.close()


def paging(
    recipe: Recipe, found: Estimate, folder: Path, *, weights: tuple[float, float], inputs: int, room: int | None
) -> tuple[Disk, Needs]:
    """Measure the rates of what the recipe pages; return them and the seconds that follow.

    folder     of the run
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
    """A warning if waiting takes most of a step of `seconds`, with what would help; else none."""
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
