"""How long the parts of a micro-batch take here: measured on two blocks of the recipe's own shape.

The code that is timed is the code that trains: the recipe's storage, method and recomputing, its documents as they lie
in a batch, and this process's threads.  Inputs of blocks stay in memory: what paging them costs is for `waits` to say.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.base.base import Base
from veneer.data.pack import Batch
from veneer.models.blocks import blocks_of
from veneer.plan.meta_model import Plain
from veneer.plan.synthetic_model import made_model
from veneer.tasks.lm_loss import backward_below, chunk_rows, head_backward, hidden_states, summed_loss
from veneer.train.activation_checkpointing import recomputing
from veneer.train.optim import build_optimizer

CHUNKS = 4
"""Of the head, at most; more take as long each."""
RUNS, ENOUGH = 7, 1.5
"""Timed runs at most, and the seconds after which two are enough."""


@dataclass(frozen=True)
class Pieces:
    """Seconds of one micro-batch, by part."""

    outside: float
    """Of both passes, before and after the blocks, and what the first block takes more than others."""
    forward: float
    """Of one block that keeps its activations."""
    backward: float
    head: float
    """For each supervised position, forward and backward."""
    head_forward: float
    """For each, without a gradient."""
    change: float
    """What a method does beside the passes of a step, for each block."""


class Spans:
    """When each block's forward pass began and ended, and when the backward pass reached the first block."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = list(blocks_of(model).values())
        self.forget()
        for block in self._blocks:
            block.register_forward_pre_hook(lambda *_: self._began.append(time.perf_counter()))
            block.register_forward_hook(self._done)

    def forget(self) -> None:
        """Before each pass."""
        self._began: list[float] = []
        self._ended: list[float] = []
        self._reached = 0.0

    def blocks(self, below: float, end: float) -> tuple[float, float]:
        """Seconds of one block, forward and backward, where the backward pass took from `below` to `end`.

        Those of the block that comes second, as all but one do: it finds memory that the first has taken.
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


def pieces(plain: Plain, batch: Batch, again: bool, ran: Callable[[int], None] = lambda _: None) -> Pieces:
    """Time `batch`; each piece is the median of a few runs, after one that is left out.

    again     with blocks that are recomputed
    ran       is told of each run
    """
    model = made_model(plain)
    blocks = len(blocks_of(model))
    change = plain.change(model).train()
    # its hooks take each gradient, as in training
    optimizer = build_optimizer(change.named(), plain.recipe.optimizer.model_copy(update={"paged": False}))
    found: list[Pieces] = []
    with recomputing(Base(model), again):
        spans = Spans(model)
        began = time.perf_counter()
        while len(found) < 3 or (len(found) <= RUNS and time.perf_counter() - began < ENOUGH):
            optimizer.zero_grad(set_to_none=True)
            found.append(_run(plain, model, change, batch, blocks, spans))
            if len(found) == 1:
                began = time.perf_counter()
            ran(1)
    names = Pieces.__dataclass_fields__
    return Pieces(**{name: median(getattr(f, name) for f in found[1:]) for name in names})


def _run(plain: Plain, model: Any, change: Adapter, batch: Batch, blocks: int, spans: Spans) -> Pieces:
    base, lean = Base(model), plain.recipe.lean
    targets = batch.targets[: CHUNKS * chunk_rows(base)]
    spans.forget()
    at = [time.perf_counter()]
    hidden = hidden_states(base, batch, packed=plain.recipe.data.packing)
    at.append(time.perf_counter())
    _, gradient = head_backward(base, hidden, targets, max(len(targets), 1), lean=lean)
    at.append(time.perf_counter())
    backward_below(base, hidden, gradient, lean=lean)
    at.append(time.perf_counter())
    if (penalty := change.penalty()) is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    change.stepped_(1, 2)
    at.append(time.perf_counter())
    summed_loss(base, hidden, targets)
    at.append(time.perf_counter())
    forward, head_both, backward, beside, head_alone = (b - a for a, b in pairwise(at))
    block_forward, block_backward = spans.blocks(at[2], at[3])
    outside = max(forward + backward - blocks * (block_forward + block_backward), 0.0)
    rows = max(len(targets), 1)
    return Pieces(outside, block_forward, block_backward, head_both / rows, head_alone / rows, beside / blocks)
