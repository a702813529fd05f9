"""Estimate the memory and disk a recipe needs, in bytes by part at the moment of the peak, before any weight is read.

Weights, adapter and optimizer state are counted on the meta model; activations are traced through the code that trains
(trace.py).  Only what the C library's heap leaves unused between tensors is a measured rule (`LEAN`, `SHORT`, ...).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from veneer import machine
from veneer.adapters.layer_view import layer_at
from veneer.adapters.restart_merge import foldable_paths
from veneer.base.memory_tracker import MemoryTracker
from veneer.base.meta import traceable
from veneer.disk.readahead import BUFFERS
from veneer.methods.base import METHODS, MethodConfig
from veneer.methods.restartable import Restartable
from veneer.plan.meta_model import base_bytes, files_to_load, largest_tensor
from veneer.plan.trace import Step, evaluation_bytes, saved_copies, step_bytes
from veneer.recipe.settings import NONE, Recipe
from veneer.train.optim.param_groups import NOT_DECAYED
from veneer.train.preflight import Checked
from veneer.train.restarts import restart_steps

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


@dataclass(frozen=True)
class Estimate:
    """What one recipe needs."""

    parts: dict[str, int]
    """Bytes by part at the peak."""
    moment: str
    """When the peak is: "loading", "beginning" (deltas are made), "forward pass", "head", "backward pass", "restart",
    "evaluation" or "saving"."""
    floor_bytes: int
    """Below this nothing works: what is alive at once, without unused heap."""
    disk: dict[str, int]
    """Bytes written, by part."""
    trained: int
    """Trained parameters."""
    droppable_bytes: int = 0
    """Paged state and the files of paged weights, in the page cache beside the parts while there is room."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


@dataclass(frozen=True)
class InitMemory:
    """Bytes needed to initialize the adapter.  Deltas are made one after the other, so the largest counts."""

    fixed: int = 0
    """Kept by deltas beside the trained parameters."""
    making: int = 0
    """Peak while one delta is made (PiSSA decomposes its weight), beside the others."""
    seen: int = 0
    """Statistics of all layers' inputs (EVA), until the deltas are made."""
    looking: int = 0
    """Peak while one layer's inputs are added to its statistics."""


def estimate(checked: Checked, runtime: int | None = None) -> Estimate:
    """What a job needs.

    runtime   resident bytes of the process before the weights are read; None is those of this one
    Raises ModelError for a model that cannot be traced.
    """
    recipe, base, adapter = checked.recipe, base_bytes(checked.meta), checked.adapter
    steps = step_bytes(checked)
    if runtime is None:  # after tracing: training needs the code that it has imported
        machine.trim_memory()
        runtime = machine.rss_bytes()
    trained, past = adapter.n_params(), finished_cycles(checked)
    held = base["blocks"] if not recipe.memory.page_weights else min(base["blocks"], BUFFERS * base["largest block"])
    fixed = {"runtime": runtime, "base": held + base["rest"] + folded_copies(checked)}
    by_layer = [sum(p.numel() for p in holder.parameters()) for holder in adapter.holders().values()]
    gradients = max(by_layer) if recipe.optimizer.in_backward else trained
    moments = round(_state_bytes(recipe) * trained)
    paged = moments if _pages_state(recipe, moments, fixed["base"]) else 0
    init = init_memory(checked)
    own = 4 * trained + init.fixed
    state = {"adapter": own + past, "gradients": 4 * gradients, "optimizer state": moments - paged, "kernels": NATIVE}
    evaluations, copies = evaluation_bytes(checked), {"copies that are saved": saved_copies(checked)}
    passes = _all_passes(checked, steps, evaluations)
    passes += [("restart", {"first values of one layer": init.making})] if past else []
    moment, passing = max([*passes, ("saving", copies)], key=lambda m: sum(m[1].values()))
    loading = fixed | {"tensor being read": largest_tensor(checked.meta)}
    alive = max(s.kept + max(s.forward, s.head, s.block) for s in [*steps, *evaluations])
    floor = sum((fixed | state).values()) + max(alive, *copies.values())
    disk = _disk(checked, base["blocks"] + base["rest"], past, max(s.paged for s in steps))
    disk |= {"paged optimizer state": paged} if paged else {}
    parts = fixed | state | passing
    droppable = paged + (base["blocks"] if recipe.memory.page_weights else 0)  # fingerprints read mapped files
    before = [loading, *_before(fixed, own, init, max(s.forward for s in steps))]
    first = max(before, key=lambda parts: sum(parts.values()))
    if (peak := sum(first.values())) > sum(parts.values()):
        return Estimate(first, "loading" if first is loading else "beginning", peak, disk, trained, droppable)
    return Estimate(parts, moment, floor, disk, trained, droppable)


def init_memory(checked: Checked) -> InitMemory:
    """Memory needed to initialize the adapter."""
    config, found, fixed, seen = checked.adapter.settings, dict[str, InitMemory](), 0, 0
    if config is None:
        return InitMemory()
    network, steps, examples = checked.meta.network, checked.job.steps, checked.job.examples
    tokens = max(sum(len(examples[i]) for i in members) for step in steps for members in step)
    known = [*network.parameters(), *network.buffers()]
    with traceable(checked.recipe.model):
        for path in checked.adapter.deltas:
            layer, own = layer_at(network, path), config.at(path)
            key = f"{layer.kind} {layer.in_features} {layer.out_features} {layer.geometry} {own}"
            if key not in found:
                found[key] = _init_layer(network, path, own, known, tokens)
            fixed, seen = fixed + found[key].fixed, seen + found[key].seen
    making, looking = (max(getattr(one, part) for one in found.values()) for part in ("making", "looking"))
    return InitMemory(fixed, making, seen, looking)


def _init_layer(network: nn.Module, path: str, config: MethodConfig, known: list[Tensor], tokens: int) -> InitMemory:
    layer, method = layer_at(network, path), METHODS[config.method]
    with MemoryTracker(known) as tracker:
        delta = method(layer, config, torch.Generator())
    fixed = sum(b.nbytes for b in delta.buffers())
    if (init := config.data_init) is None:
        return InitMemory(fixed, tracker.peak)
    watch = init.watch(config)
    with MemoryTracker(known) as looking:
        for _ in range(2):  # the second micro-batch is added to the first
            watch.see(torch.empty(tokens, layer.in_features, device="meta"))
    return InitMemory(fixed, tracker.peak, looking.live, looking.peak)


def finished_cycles(checked: Checked) -> int:
    """Bytes of the finished cycles at the end of a run with restarts, float32; the adapter holds them too."""
    config, adapter = checked.adapter.settings, checked.adapter
    finished = len(restart_steps(checked.recipe.restarts, len(checked.job.steps)))
    if config is None or not finished:
        return 0
    kind, network = METHODS[config.method], checked.meta.network
    assert issubclass(kind, Restartable), "preflight refuses restarts of any other method"
    return 4 * sum(kind.n_past(layer_at(network, path), config.at(path), finished) for path in adapter.deltas)


def folded_copies(checked: Checked) -> int:
    """Bytes of the base's weights that wait while restarts fold finished cycles into them."""
    restarts, network = checked.recipe.restarts, checked.meta.network
    if restarts.fold == "beside" or not restart_steps(restarts, len(checked.job.steps)):
        return 0
    paths = foldable_paths(network, checked.adapter.deltas)
    return sum(network.get_submodule(path).get_parameter("weight").nbytes for path in paths)


def _before(fixed: dict[str, int], adapter: int, init: InitMemory, forward: int) -> list[dict[str, int]]:
    """What is held while deltas are made, and before that while the method looks at the layers' inputs."""
    making = fixed | {"adapter": adapter, "first values of one layer": init.making, "inputs seen": init.seen}
    looking = fixed | {"activations": forward, "inputs of one layer": init.looking, "inputs seen": init.seen}
    return [making, looking] if init.seen else [{name: n for name, n in making.items() if n}]


def _state_bytes(recipe: Recipe) -> float:
    """Optimizer state of one trained parameter; Adafactor's sums of rows and columns count as none."""
    own = recipe.optimizer
    if own.name == "adamw":
        return BYTES_8_BITS if own.bits == 8 else 8.0
    return 4.0 if own.momentum or own.name == "lion" else 0.0


def _pages_state(recipe: Recipe, moments: int, base: int) -> bool:
    """Whether the optimizer pages its state, by the rule it applies itself once the base is loaded."""
    if recipe.optimizer.name != "adamw":
        return False
    paged, free = recipe.optimizer.paged, machine.available_bytes()
    return paged is True or (paged == "auto" and free is not None and moments > max(free - base, 0) // 2)


def has_matrices(recipe: Recipe) -> bool:
    """Whether the method trains more than scales and biases."""
    method = recipe.method.name
    return method != NONE and any(role not in NOT_DECAYED for role in METHODS[method].roles.values())


def unused_heap(recipe: Recipe, longest: int) -> tuple[float, float]:
    """The two numbers of `LEAN` for this recipe, whose longest row has `longest` tokens."""
    if recipe.lean or not has_matrices(recipe):
        return LEAN if recipe.lean else WITHOUT_MATRICES
    (short, most), (long, least) = SHORT, LONG
    return float(np.interp(longest, (short, long), (most, least))), WITHOUT_MATRICES[1]


def _all_passes(checked: Checked, steps: list[Step], evaluations: list[Step]) -> list[tuple[str, dict[str, int]]]:
    """Every pass of the steps and evaluations, with its bytes by part."""
    blocks, unused = len(checked.meta.blocks), unused_heap(checked.recipe, max(map(len, checked.job.examples)))
    found = [moment for step in steps for moment in passes_of(step, blocks, unused).items()]
    return found + [("evaluation", parts) for e in evaluations for parts in passes_of(e, blocks, unused).values()]


def passes_of(step: Step, blocks: int, unused: tuple[float, float]) -> dict[str, dict[str, int]]:
    """What each pass of a step needs beyond what is held all the time."""
    for_kept, for_blocks = unused
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


def _disk(checked: Checked, base: int, past: int, inputs: int) -> dict[str, int]:
    """The adapter, checkpoints (one more than are kept, while it is written), a quantized base, paged activations."""
    train, trained = checked.recipe.train, checked.adapter.n_params()
    disk = {"adapter": 4 * trained + past, "checkpoints": (train.keep_checkpoints + 1) * (12 * trained + past)}
    _, to_quantize = files_to_load(checked)
    if to_quantize:
        disk[IN_CACHE[0]] = base
    if to_quantize and checked.recipe.memory.page_weights:
        disk[IN_CACHE[1]] = base
    if inputs:
        disk["paged activations"] = inputs
    return disk
