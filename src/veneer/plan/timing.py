"""Time the parts of a run here: two blocks of the recipe's own shape with synthetic weights, and the optimizer.

The code that is timed is the code that trains, with the recipe's storage, method and recomputing, on a real batch and
this process's threads.  Timings are cached under everything they depend on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from veneer import machine
from veneer.adapters.adapter import Adapter
from veneer.adapters.part import NamedParameter
from veneer.base.base import Base
from veneer.base.device import CPU
from veneer.base.load import compute_with_
from veneer.base.quantize import Quantizer
from veneer.data.pack import Batch
from veneer.disk.atomic import write_json
from veneer.errors import DiskError
from veneer.kernels import native
from veneer.methods.restartable import restartable
from veneer.models.skeleton import build_skeleton
from veneer.plan.meta_model import attach_to_few
from veneer.recipe.settings import Recipe
from veneer.storage import Storage, StorageConfig
from veneer.storage.layers import store_weight
from veneer.tasks.lm_loss import backward_below, chunk_rows, head_backward, hidden_states, summed_loss
from veneer.train.activation_checkpointing import recomputing
from veneer.train.optim import build_optimizer
from veneer.train.optim.step_in_backward import StepInBackward
from veneer.train.preflight import Checked
from veneer.train.restarts import Restarts, restart_steps

CHUNKS = 4
"""Of the head, at most; more take as long each."""
RUNS, ENOUGH = 7, 1.5
"""Timed runs at most, and the seconds after which two are enough."""
STEPPED, STEPS = 1 << 23, 5
"""Parameters that the optimizer is timed with at most, far more than a processor's cache holds; and its timed steps."""
PATTERN = 1 << 20
"""Random numbers that are drawn; a larger weight repeats them."""


@dataclass(frozen=True)
class Pieces:
    """Seconds of one micro-batch, by part."""

    outside: float
    """Both passes outside of the blocks, and what the first block takes more than others."""
    forward: float
    """One block that keeps its activations."""
    backward: float
    head: float
    """Each supervised position, forward and backward."""
    head_forward: float
    """Each, without a gradient."""
    change: float
    """What a method does beside the passes of a step, for each block."""


def cached(facts: Mapping[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the cached timing for these facts on this machine, versions and threads; measure on a miss."""
    about = machine.describe()
    here = {
        "cpu": [about.cpu, *about.isa],
        "threads": torch.get_num_threads(),
        "versions": [version("veneer"), torch.__version__, version("transformers")],
    }
    key = hashlib.sha256(json.dumps([here, facts], sort_keys=True).encode()).hexdigest()
    file = machine.cache_dir() / "timings" / f"{key[:32]}.json"
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # absent, or damaged: measured again
        found = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return {str(name): float(value) for name, value in found.items()}
    seconds = measure()
    with suppress(DiskError):  # a cache that cannot be written costs the next plan some seconds
        write_json(file, {"seconds": seconds, "here": here, "facts": facts})
    return seconds


def facts(checked: Checked) -> dict[str, Any]:
    """What the seconds of a block depend on, besides the batch and the machine."""
    recipe, storage = checked.recipe, checked.storage
    return {
        "config": (checked.meta.files / "config.json").read_text(encoding="utf-8"),
        "dtype": recipe.train.dtype,
        "storage": None if storage is None else [storage.settings, storage.backend],
        "kernels": None if storage is None and recipe.optimizer.bits == 32 else native.status().isa,
        "method": recipe.method.model_dump(mode="json"),
        "prompt": recipe.prompt.model_dump(mode="json"),
        "optimizer": [recipe.optimizer.name, recipe.optimizer.bits, recipe.optimizer.in_backward],
        "packing": recipe.data.packing,
        "heap is trimmed": recipe.lean,
    }


def pieces(checked: Checked, batch: Batch, recompute: bool, ran: Callable[[int], None] = lambda _: None) -> Pieces:
    """Time `batch`; each piece is the median of a few runs, after one for warm-up.

    recompute   whether blocks are recomputed in the backward pass
    ran         is told of each run
    """
    base = synthetic_model(checked)
    adapter = attach_to_few(checked, base).train()
    # its hooks take each gradient, as in training
    optimizer = build_optimizer(adapter.named(), checked.recipe.optimizer.model_copy(update={"paged": False}))
    found: list[Pieces] = []
    with recomputing(base, recompute):
        spans = Spans(base)
        began = time.perf_counter()
        while len(found) < 3 or (len(found) <= RUNS and time.perf_counter() - began < ENOUGH):
            optimizer.zero_grad(set_to_none=True)
            found.append(_run(checked.recipe, base, adapter, batch, spans))
            if len(found) == 1:
                began = time.perf_counter()
            ran(1)
    names = Pieces.__dataclass_fields__
    return Pieces(**{name: median(getattr(f, name) for f in found[1:]) for name in names})


class Spans:
    """When each block's forward pass began and ended, and when the backward pass reached the first block."""

    def __init__(self, base: Base) -> None:
        self._blocks = list(base.blocks.values())
        self.forget()
        for block in self._blocks:
            block.register_forward_pre_hook(lambda *_: self._began.append(time.perf_counter()))
            block.register_forward_hook(self._done)

    def forget(self) -> None:
        """Call before each pass."""
        self._began: list[float] = []
        self._ended: list[float] = []
        self._reached = 0.0

    def blocks(self, below: float, end: float) -> tuple[float, float]:
        """Seconds of one block, forward and backward; the backward pass of the blocks took from `below` to `end`.

        Those of the second block: like all later ones it finds memory that the first has allocated.
        """
        count = len(self._blocks)
        if len(self._began) != count or count < 2:  # a prompt passes through the blocks too
            return sum(self._ended) / count - sum(self._began) / count, (end - below) / count
        return self._ended[-1] - self._began[-1], end - self._reached

    def _done(self, block: nn.Module, _given: Any, output: Any) -> None:
        self._ended.append(time.perf_counter())
        first = output if isinstance(output, Tensor) else output[0]
        if block is self._blocks[0] and first.requires_grad:
            first.register_hook(self._reach)

    def _reach(self, _gradient: Tensor) -> None:
        self._reached = time.perf_counter()


def _run(recipe: Recipe, base: Base, adapter: Adapter, batch: Batch, spans: Spans) -> Pieces:
    blocks, lean = len(base.blocks), recipe.lean
    targets = batch.targets[: CHUNKS * chunk_rows(base)]
    spans.forget()
    at = [time.perf_counter()]
    hidden = hidden_states(base, batch, packed=recipe.data.packing)
    at.append(time.perf_counter())
    _, gradient = head_backward(base, hidden, targets, max(len(targets), 1), lean=lean)
    at.append(time.perf_counter())
    backward_below(base, hidden, gradient, lean=lean)
    at.append(time.perf_counter())
    if (penalty := adapter.penalty()) is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    adapter.stepped_(1, 2)
    at.append(time.perf_counter())
    summed_loss(base, hidden, targets)
    at.append(time.perf_counter())
    forward, head_both, backward, beside, head_alone = (b - a for a, b in pairwise(at))
    block_forward, block_backward = spans.blocks(at[2], at[3])
    outside = max(forward + backward - blocks * (block_forward + block_backward), 0.0)
    rows = max(len(targets), 1)
    return Pieces(outside, block_forward, block_backward, head_both / rows, head_alone / rows, beside / blocks)


def optimizer_seconds(recipe: Recipe, like: list[NamedParameter], trained: int, folder: Path, *, paged: bool) -> float:
    """Seconds of one step over `trained` parameters in tensors like these, after a first one for warm-up.

    paged    whether the state is paged to disk, in `folder`
    """
    settings, have = recipe.optimizer, sum(n.parameter.numel() for n in like)
    if settings.name == "adamw":
        settings = settings.model_copy(update={"paged": paged})
    copies = max(1, round(min(trained, STEPPED) / have))
    named = [replace(n, parameter=nn.Parameter(torch.zeros(n.parameter.shape))) for _ in range(copies) for n in like]
    parameters = [n.parameter for n in named]
    optimizer, ones = build_optimizer(named, settings, folder), [torch.ones_like(p) for p in parameters]
    in_backward, taken = getattr(optimizer, "step_in_backward", None), []
    for _ in range(1 + STEPS):
        optimizer.zero_grad(set_to_none=True)
        if isinstance(in_backward, StepInBackward):
            in_backward.begin()
        torch.autograd.backward(parameters, ones)
        began = time.perf_counter()
        if in_backward is None:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip or float("inf"))
        optimizer.step()
        taken.append(time.perf_counter() - began)
    return median(taken[1:]) * trained / (copies * have)


def quantizing_seconds(checked: Checked) -> float:
    """Seconds for each number that is quantized, timed on the layers of one block."""
    spent, numbers = 0.0, 0

    def timed(w: Tensor, config: StorageConfig, name: str) -> Storage:
        nonlocal spent, numbers
        made = synthetic(w, drawn)
        began = time.perf_counter()
        storage = store_weight(made, config, name)
        spent, numbers = spent + time.perf_counter() - began, numbers + w.numel()
        return storage

    drawn, network = _pattern(), build_skeleton(checked.meta.files, checked.meta.dtype, blocks=1)
    Quantizer(checked.storage, kept=timed).on_whole_model(network)
    return spent / max(numbers, 1)


def restart_seconds(checked: Checked) -> float:
    """Seconds for each trained parameter of the restart in the middle of the run: each takes longer than the last."""
    recipe, steps = checked.recipe, len(checked.job.steps)
    adapter = attach_to_few(checked, synthetic_model(checked))
    optimizer = build_optimizer(adapter.named(), recipe.optimizer.model_copy(update={"paged": False}))
    restarts, at = Restarts(recipe, adapter, steps), restart_steps(recipe.restarts, steps)
    for _ in range(len(at) // 2):
        for delta in restartable(adapter.deltas).values():
            delta.remember_()
    return float(restarts.restart_(optimizer, at[len(at) // 2])["seconds"]) / adapter.n_params()


def synthetic_model(checked: Checked) -> Base:
    """The first two blocks with embeddings and head, frozen, with synthetic weights in the recipe's storage.

    What a block computes does not depend on the values of its weights, so none are read.  The input of the first block
    requires a gradient, as that of every other block does when deltas lie below.
    """
    meta, storage, drawn = checked.meta, checked.storage, _pattern()
    network = build_skeleton(meta.files, meta.dtype, blocks=2)
    if storage is not None:

        def quantized(w: Tensor, config: StorageConfig, name: str) -> Storage:
            return store_weight(synthetic(w, drawn), config, name)  # one weight at a time is dense

        Quantizer(storage, kept=quantized).on_whole_model(network)
        compute_with_(network, storage, CPU)
    _fill_(network.modules(), drawn)
    network.get_input_embeddings().register_forward_hook(_require_gradient)
    return Base(network.eval().requires_grad_(False), None, meta.name, meta.folder, CPU)


def _pattern() -> Tensor:
    return torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))


def _fill_(modules: Iterable[nn.Module], drawn: Tensor) -> None:
    """Replace every parameter on the meta device by a synthetic one; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(synthetic(parameter, drawn), requires_grad=False)
                module._parameters[name] = made[id(parameter)]


def synthetic(w: Tensor, drawn: Tensor) -> Tensor:
    """A weight of w's shape and dtype that keeps the scale of activations: rows of length 1, or ones for a vector."""
    made = torch.ones(w.shape, dtype=w.dtype)
    if w.dim() < 2:
        return made
    flat, values = made.view(-1), (drawn * w.shape[-1] ** -0.5).to(w.dtype)
    for start in range(0, flat.numel(), PATTERN):
        part = flat[start : start + PATTERN]
        part.copy_(values[: part.numel()])
    return made


def _require_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(torch.is_grad_enabled())
