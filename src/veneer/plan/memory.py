"""What a recipe takes, in bytes by part, at the moment when it takes most: known before any weight is read.

Weights, adapters and state are counted from the model's modules without data; activations are counted from the code
that really trains, run on tensors without data (`ledger`).  Only what the C allocator leaves unused between tensors is
a measured rule (`HOLES`).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veneer import machine
from veneer.adapters.quantized_dir import cache_folder, is_quantized
from veneer.disk.readahead import BUFFERS
from veneer.models.blocks import blocks_of
from veneer.plan.cycles import cycles_of
from veneer.plan.skeleton import Plain, base_bytes, largest_tensor
from veneer.plan.step import Step, largest_batches, step_bytes
from veneer.train.prepare import Plan, Rows
from veneer.train.settings import Recipe
from veneer.units import format_bytes as size
from veneer.units import parse_bytes

MIB = 2**20
HOLES_KEPT, HOLES_BLOCK = 0.45, 3.0
"""Bytes that glibc's heap holds unused: for each byte the blocks keep, and for each byte that one block computes with.

Tensors that stay lie between others that come and go, and room that is freed in two sizes seldom fits. Measured on
SmolLM2 (30 blocks, bfloat16, one thread) as the second step's resident set minus what was alive: 512, 1024 and 2048
tokens 191, 445 and 750 MiB for 367, 729 and 1453 kept; 2048 tokens recomputed 275 for 73 kept and 59 in a block; 1024
tokens with 15 of 30 blocks recomputed 300 for 382 and 29, with DoRA 650 for 1335. With every tensor above 64 KiB mapped
by itself (MALLOC_MMAP_THRESHOLD_=65536) the same run holds what is alive, within 3 MiB, and takes 2.4 times as long.
"""
NATIVE = 25 * MIB
"""Code and scratch of the matrix libraries after the first steps; measured likewise, without holes: 15 to 35 MiB."""
BYTES_8_BITS = 2 + 8 / 256
"""A number's two moments in 8 bits, with an absmax each for every 256."""
MARGIN = 0.1
"""`train` refuses only where even this share less than foreseen would not fit."""


@dataclass(frozen=True)
class Estimate:
    """What one recipe takes."""

    parts: dict[str, int]
    """Bytes by part at the peak."""
    moment: str
    """When the peak is: "step", or "loading"."""
    floor_bytes: int
    """Below this nothing works: what is alive at once, without any holes."""
    disk: dict[str, int]
    """Bytes written, by part."""
    trained: int
    """Numbers that are trained."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def estimate(recipe: Recipe, rows: Rows, order: Plan, runtime: int | None = None) -> Estimate:
    """What `recipe` takes on these rows in this order of steps.

    runtime   bytes that the process holds before the weights are read; None is what this one holds now
    Raises ModelError for a model that cannot be sized.
    """
    plain = Plain.of(recipe)
    runtime = machine.rss_bytes() if runtime is None else runtime
    model = plain.model()
    base, count, changes = base_bytes(model), len(blocks_of(model)), plain.trained(model)
    trained = sum(changes)
    steps = [step_bytes(plain, batch, count) for batch in largest_batches(recipe, rows.examples, order)]
    step = max(steps, key=lambda s: s.kept + s.block + s.head)
    held = base["blocks"] if not recipe.memory.page_weights else min(base["blocks"], BUFFERS * base["largest block"])
    cycles = cycles_of(plain, model, len(order))
    fixed = {"runtime": runtime, "base": held + base["rest"] + cycles.base}
    gradients = max(changes) if recipe.optimizer.in_backward else trained
    moments = (BYTES_8_BITS if recipe.optimizer.bits == 8 else 8) * trained
    paged = round(moments) if recipe.optimizer.paged is True else 0
    state = {
        "adapter": 4 * trained + cycles.past,
        "gradients": 4 * gradients,
        "optimizer state": round(moments) - paged,
    }
    parts = fixed | state | _activations(step) | {"kernels": NATIVE}
    loading = fixed | {"tensor being read": largest_tensor(model, plain.folder)}
    floor = sum((fixed | state).values()) + step.kept + max(step.head, step.block) + NATIVE
    disk = _disk(plain, base["blocks"] + base["rest"], trained, cycles.past, step.paged)
    if paged:
        disk["paged optimizer state"] = paged
    if sum(loading.values()) > sum(parts.values()):
        return Estimate(loading, "loading", sum(loading.values()), disk, trained)
    return Estimate(parts, "step", floor, disk, trained)


def _activations(step: Step) -> dict[str, int]:
    return {
        "activations": step.kept + step.block,
        "logits": step.head,
        "holes in the heap": round(HOLES_KEPT * step.kept + HOLES_BLOCK * step.block),
    }


def _cached(plain: Plain) -> bool:
    storage = plain.storage
    return is_quantized(plain.folder) or (storage is not None and cache_folder(plain.folder, storage).is_dir())


def _disk(plain: Plain, base: int, trained: int, past: int, inputs: int) -> dict[str, int]:
    """The adapter, checkpoints (one more than are kept, while one is written), a quantized base, paged activations."""
    train = plain.recipe.train
    disk = {"adapter": 4 * trained + past, "checkpoints": (train.keep_checkpoints + 1) * (12 * trained + past)}
    if plain.storage is not None and not _cached(plain):
        disk["quantized base in the cache"] = base
    if inputs:
        disk["paged activations"] = inputs
    return disk


@dataclass(frozen=True)
class Room:
    """What there is."""

    memory: int | None
    """Bytes a run may hold; None where the system does not tell."""
    disk: int
    source: str
    """Where the limit on memory comes from."""


def room_for(recipe: Recipe, available: Callable[[], int | None] = machine.available_bytes) -> Room:
    """The budget of the recipe, else what this process holds and can still take."""
    folder = Path(recipe.run).absolute()
    disk = shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.exists())).free
    if recipe.memory.budget is not None:
        return Room(parse_bytes(recipe.memory.budget), disk, "memory.budget")
    free = available()
    return Room(None if free is None else free + machine.rss_bytes(), disk, "this machine")


def verdict(found: Estimate, room: Room) -> list[str]:
    """Everything that does not fit; empty where all does."""
    problems = []
    if room.memory is not None and found.peak_bytes > room.memory:
        floor = f"; below {size(found.floor_bytes)} nothing works" if found.floor_bytes > room.memory else ""
        problems.append(
            f"memory: {size(found.peak_bytes)} at the peak ({found.moment}), but {room.source} leaves "
            f"{size(room.memory)}{floor}"
        )
    if found.disk_bytes > room.disk:
        problems.append(f"disk: {size(found.disk_bytes)} to be written, but {size(room.disk)} are free")
    return problems


def certainly_too_large(found: Estimate, room: Room) -> bool:
    """Whether it would not fit even if the estimate were `MARGIN` too high, or its disk is too small."""
    memory = room.memory is not None and found.peak_bytes * (1 - MARGIN) > room.memory
    return memory or found.disk_bytes > room.disk
