"""What a recipe takes, in bytes by part, at the moment when it takes most: known before any weight is read.

Weights, adapters and state are counted from the model's modules without data; activations are counted from the code
that really trains, run on tensors without data (`ledger`).  Only what the C allocator leaves unused between tensors is
a measured rule (`LEAN`, `USUAL` ...).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from veneer import machine
from veneer.disk.readahead import BUFFERS
from veneer.methods.base import METHODS
from veneer.models.blocks import blocks_of
from veneer.plan.activation_trace import Step, largest_batches, step_bytes
from veneer.plan.eval_memory import copied_bytes, evaluations
from veneer.plan.init_memory import Beginning, beginning_of
from veneer.plan.meta_model import Plain, base_bytes, largest_tensor
from veneer.plan.restart_memory import cycles_of
from veneer.plan.startup_time import files_to_load
from veneer.recipe.settings import NONE, Recipe
from veneer.train.job import BatchPlan, Job
from veneer.train.optim.param_groups import NOT_DECAYED
from veneer.units import format_bytes as size
from veneer.units import parse_bytes

MIB = 2**20
LEAN, WITHOUT_MATRICES = (0.27, 0.37), (0.27, 0.2)
"""Bytes that glibc's heap holds unused at the end of the forward pass: for each byte that blocks keep, and for each
byte that a block computes with, times the blocks (`MOST_BLOCKS`); the second part is at most `MOST_HOLES`.

Tensors that stay lie between others that come and go, and room that is freed in two sizes seldom fits. Lean runs give
freed memory back between passes and blocks; others keep it, and then it matters whether low-rank factors leave small
tensors between the large ones. These, the next and those of the head and the backward pass are fitted to the largest
resident set of the recipes `FITTED` of benchmarks/plan_accuracy.py on one thread, less what was alive.
"""
SHORT, LONG = (512, 0.6), (1024, 0.35)
"""The first number in usual runs, by the tokens of the longest row, and between the two by a line; measured 0.53 to
0.66 up to 512 tokens, and 0.25 to 0.49 from 1000 on."""
MOST_BLOCKS, MOST_HOLES = 30, 280 * MIB
"""The most that were measured."""
HOLES_HEAD = 0.4
"""Unused for each byte of the head's logits; measured 0 to 0.6, and 1.7 where the forward pass is larger anyway."""
HOLES_BACKWARD, HOLES_BLOCK = 0.1, 1.2
"""In the backward pass: for each byte that is kept, and for each that a block is computed again and differentiated
with."""
NATIVE = 55 * MIB
"""Code and scratch of the matrix libraries after the first steps; measured 28 to 75 MiB with nothing else alive."""
BYTES_8_BITS = 2 + 8 / 256
"""A number's two moments in 8 bits, with an absmax each for every 256."""
IN_CACHE = ("quantized base in the cache", "its scratch file, as it is made")
"""Parts of the disk that veneer's cache takes; weights that will be paged go through a scratch file there."""
MARGIN = 0.1
"""`train` refuses only where even this share less than foreseen would not fit."""


@dataclass(frozen=True)
class Estimate:
    """What one recipe takes."""

    parts: dict[str, int]
    """Bytes by part at the peak."""
    moment: str
    """When the peak is: "loading", "beginning" (deltas are made), "forward pass", "head", "backward pass", "restart",
    "evaluation" or "saving"."""
    floor_bytes: int
    """Below this nothing works: what is alive at once, without any holes."""
    disk: dict[str, int]
    """Bytes written, by part."""
    trained: int
    """Numbers that are trained."""
    droppable_bytes: int = 0
    """Paged state and the files of paged weights, in memory beside the parts for as long as there is room."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def estimate(recipe: Recipe, rows: Job, order: BatchPlan, runtime: int | None = None) -> Estimate:
    """What `recipe` takes on these rows in this order of steps.

    runtime   bytes that the process holds before the weights are read; None is what this one holds now
    Raises ModelError for a model that cannot be sized.
    """
    plain = Plain.of(recipe)
    model = plain.model()
    base, count, changes = base_bytes(model), len(blocks_of(model)), plain.trained(model)
    steps = [step_bytes(plain, batch, count) for batch in largest_batches(recipe, rows.examples, order)]
    if runtime is None:  # after the traces: training needs the code that they have loaded
        machine.trim_memory()
        runtime = machine.rss_bytes()
    trained = sum(changes)
    held = base["blocks"] if not recipe.memory.page_weights else min(base["blocks"], BUFFERS * base["largest block"])
    cycles = cycles_of(plain, model, len(order))
    fixed = {"runtime": runtime, "base": held + base["rest"] + cycles.base}
    gradients = max(changes) if recipe.optimizer.in_backward else trained
    moments = round(_bytes_of_state(recipe) * trained)
    paged = moments if _pages_state(recipe, moments, fixed["base"]) else 0
    tokens = max(sum(len(rows.examples[i]) for i in members) for micro in order for members in micro)
    begins = beginning_of(plain, model, tokens)
    adapter = 4 * trained + begins.fixed
    state = {"adapter": adapter + cycles.past, "gradients": 4 * gradients, "optimizer state": moments - paged}
    state |= {"kernels": NATIVE}
    holes = _holes(recipe, max(map(len, rows.examples)))
    passes = [m for s in steps for m in _passes(s, count, holes).items()]
    aside = evaluations(plain, rows, count)
    passes += [("evaluation", parts) for s in aside for parts in _passes(s, count, holes).values()]
    passes += [("restart", {"first values of one layer": begins.making})] if cycles.past else []
    copies = {"copies that are saved": copied_bytes(plain, len(order), trained)}
    moment, passing = max([*passes, ("saving", copies)], key=lambda m: sum(m[1].values()))
    loading = fixed | {"tensor being read": largest_tensor(model, plain.folder)}
    before = [loading, *_before(fixed, adapter, begins, max(s.forward for s in steps))]
    alive = max(s.kept + max(s.forward, s.head, s.block) for s in [*steps, *aside])
    floor = sum((fixed | state).values()) + max(alive, *copies.values())
    disk = _disk(plain, base["blocks"] + base["rest"], trained, cycles.past, max(s.paged for s in steps))
    if paged:
        disk["paged optimizer state"] = paged
    parts = fixed | state | passing
    droppable = paged + (base["blocks"] if recipe.memory.page_weights else 0)  # fingerprints look into mapped files
    first = max(before, key=lambda parts: sum(parts.values()))
    if (peak := sum(first.values())) > sum(parts.values()):
        return Estimate(first, "loading" if first is loading else "beginning", peak, disk, trained, droppable)
    return Estimate(parts, moment, floor, disk, trained, droppable)


def _before(fixed: dict[str, int], adapter: int, begins: Beginning, forward: int) -> list[dict[str, int]]:
    """What is held while deltas are made, and before that while layers are looked at."""
    making = fixed | {"adapter": adapter, "first values of one layer": begins.making, "inputs seen": begins.seen}
    looking = fixed | {"activations": forward, "inputs of one layer": begins.looking, "inputs seen": begins.seen}
    return [making, looking] if begins.seen else [{name: n for name, n in making.items() if n}]


def _bytes_of_state(recipe: Recipe) -> float:
    """For each number that is trained; Adafactor's sums of rows and columns count as none."""
    own = recipe.optimizer
    if own.name == "adamw":
        return BYTES_8_BITS if own.bits == 8 else 8.0
    return 4.0 if own.momentum or own.name == "lion" else 0.0


def _pages_state(recipe: Recipe, moments: int, base: int) -> bool:
    """Whether the optimizer's state goes to disk, as the optimizer itself decides once the base is there."""
    if recipe.optimizer.name != "adamw":
        return False
    paged, free = recipe.optimizer.paged, machine.available_bytes()
    return paged is True or (paged == "auto" and free is not None and moments > max(free - base, 0) // 2)


def has_matrices(recipe: Recipe) -> bool:
    """Whether the method trains more than scales and biases."""
    method = recipe.method.name
    return method != NONE and any(role not in NOT_DECAYED for role in METHODS[method].roles.values())


def _holes(recipe: Recipe, longest: int) -> tuple[float, float]:
    """The two numbers of `LEAN` for this recipe, whose longest row has so many tokens."""
    if recipe.lean or not has_matrices(recipe):
        return LEAN if recipe.lean else WITHOUT_MATRICES
    (short, most), (long, least) = SHORT, LONG
    return float(np.interp(longest, (short, long), (most, least))), WITHOUT_MATRICES[1]


def _passes(step: Step, blocks: int, holes_of: tuple[float, float]) -> dict[str, dict[str, int]]:
    """Each pass of a step, and what it takes beyond what is there all the time."""
    for_kept, for_blocks = holes_of
    holes = {
        "forward pass": for_kept * step.kept + min(for_blocks * min(blocks, MOST_BLOCKS) * step.forward, MOST_HOLES),
        "head": HOLES_HEAD * step.head,
        "backward pass": HOLES_BACKWARD * step.kept + HOLES_BLOCK * step.block,
    }
    alive = {
        "forward pass": {"activations": step.kept + step.forward},
        "head": {"activations": step.kept, "logits": step.head},
        "backward pass": {"activations": step.kept + step.block},
    }
    return {name: parts | {"holes in the heap": round(holes[name])} for name, parts in alive.items()}


def _disk(plain: Plain, base: int, trained: int, past: int, inputs: int) -> dict[str, int]:
    """The adapter, checkpoints (one more than are kept, while one is written), a quantized base, paged activations."""
    train = plain.recipe.train
    disk = {"adapter": 4 * trained + past, "checkpoints": (train.keep_checkpoints + 1) * (12 * trained + past)}
    _, fresh = files_to_load(plain)
    if fresh:
        disk[IN_CACHE[0]] = base
    if fresh and plain.recipe.memory.page_weights:
        disk[IN_CACHE[1]] = base
    if inputs:
        disk["paged activations"] = inputs
    return disk


@dataclass(frozen=True)
class Room:
    """What there is."""

    memory: int | None
    """Bytes a run may hold; None where the system does not tell."""
    disk: int
    """Bytes free where the run is written."""
    source: str
    """Where the limit on memory comes from."""
    cache: int | None = None
    """Bytes free where veneer's cache is, if that is another file system."""


def room_for(recipe: Recipe, available: Callable[[], int | None] = machine.available_bytes) -> Room:
    """The budget of the recipe, but no more than this process holds and can still take."""
    run, cache = _existing(Path(recipe.run)), _existing(machine.cache_dir())
    disk = shutil.disk_usage(run).free
    apart = shutil.disk_usage(cache).free if cache.stat().st_dev != run.stat().st_dev else None
    free = available()
    here = None if free is None else free + machine.rss_bytes()
    if recipe.memory.budget is None:
        return Room(here, disk, "this machine", apart)
    budget = parse_bytes(recipe.memory.budget)
    if here is not None and here < budget:
        return Room(here, disk, f"memory.budget is {size(budget)}, but this machine", apart)
    return Room(budget, disk, "memory.budget", apart)


def _existing(folder: Path) -> Path:
    """The folder, or the part of its path that is there."""
    return next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())


def verdict(found: Estimate, room: Room) -> list[str]:
    """Everything that does not fit; empty where all does."""
    problems = []
    if room.memory is not None and found.peak_bytes > room.memory:
        floor = f"; below {size(found.floor_bytes)} nothing works" if found.floor_bytes > room.memory else ""
        problems.append(
            f"memory: {size(found.peak_bytes)} at the peak ({found.moment}), but {room.source} leaves "
            f"{size(room.memory)}{floor}"
        )
    return problems + _disk_problems(found, room)


def _disk_problems(found: Estimate, room: Room) -> list[str]:
    if room.cache is None:
        short = found.disk_bytes > room.disk
        return [f"disk: {size(found.disk_bytes)} to be written, but {size(room.disk)} are free"] if short else []
    cached = sum(found.disk.get(part, 0) for part in IN_CACHE)
    run, problems = found.disk_bytes - cached, []
    if run > room.disk:
        problems.append(f"disk: {size(run)} to be written to the run, but {size(room.disk)} are free there")
    if cached > room.cache:
        problems.append(
            f"disk: {size(cached)} to be written to the cache {machine.cache_dir()}, but {size(room.cache)} are free "
            "there; set VENEER_CACHE to a folder with more room"
        )
    return problems


def certainly_too_large(found: Estimate, room: Room) -> bool:
    """Whether it would not fit even if the estimate were `MARGIN` too high, or its disk is too small."""
    memory = room.memory is not None and found.peak_bytes * (1 - MARGIN) > room.memory
    return memory or bool(_disk_problems(found, room))
