"""What one micro-batch takes, traced on the first few blocks and carried on to all of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from veneer.adapters.adapter import Adapter
from veneer.base.base import Base
from veneer.data.example import Example
from veneer.data.pack import Batch, collate
from veneer.errors import ModelError, VeneerError
from veneer.models.blocks import blocks_of
from veneer.plan.memory_tracker import Ledger
from veneer.plan.meta_attention import attending_fused_
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import Recipe
from veneer.tasks.causal_lm import ROUND
from veneer.tasks.lm_loss import backward, chunk_rows, hidden_states
from veneer.train.activation_checkpointing import recomputing
from veneer.train.activation_offload import BEHIND
from veneer.train.job import BatchPlan

TRACED = 3
"""Blocks."""
IN_FLIGHT = BEHIND + 2
"""Paged tensors in memory: those that wait to be written, one in use, one read ahead."""


@dataclass(frozen=True)
class Step:
    """Bytes of one micro-batch."""

    kept: int
    """By the blocks, from the forward pass to the backward pass."""
    forward: int
    """Beyond that in the forward pass, while one block is computed."""
    head: int
    """Beyond what is kept while the loss is computed, in chunks."""
    block: int
    """Beyond it in the backward pass, while one block is computed again and differentiated."""
    paged: int = 0
    """Kept on disk instead."""


def largest_batches(
    recipe: Recipe, examples: Sequence[Example], steps: BatchPlan, *, rounded: bool = True
) -> list[Batch]:
    """The micro-batches that may take most: of the most tokens, and of the most room for attention.

    rounded    packed ones are filled up, as training does
    """
    members = {tuple(m) for step in steps for m in step}
    longest = {m: max(len(examples[i]) for i in m) for m in members}
    tokens = {m: sum(len(examples[i]) for i in m) for m in members}
    chosen = {max(members, key=lambda m: (tokens[m], m)), max(members, key=lambda m: (len(m) * longest[m] ** 2, m))}
    multiple = ROUND if recipe.data.packing and rounded else 1
    return [collate([examples[i] for i in m], multiple) for m in sorted(chosen)]


def step_bytes(plain: Plain, batch: Batch, blocks: int) -> Step:
    """What `batch` takes in a model of so many blocks."""
    recipe, wanted, places = plain.recipe, plain.recipe.train.recompute, plain.places
    again = range(blocks if wanted is True else wanted) if isinstance(wanted, int) else wanted
    counts = Counter((i in again, places.changes(i)) for i in range(places.first, blocks))
    traced = {k: _traced(plain, batch, *k) for k in counts or [(False, True)]}
    slopes = {k: slope for k, (_, slope) in traced.items()}
    alike = [k for k in traced if k[1]] or list(traced)
    outside = max(traced[k][0].kept - TRACED * slopes[k] for k in alike)
    kept = outside + sum(slopes[k] * n for k, n in counts.items())
    inputs = {k: slope for k, slope in slopes.items() if k[0] and recipe.memory.page_activations}
    paged = sum(slope * counts[k] for k, slope in inputs.items())
    waiting = min(paged, IN_FLIGHT * max(inputs.values(), default=0))
    forward, head, block = (max(getattr(t, part) for t, _ in traced.values()) for part in ("forward", "head", "block"))
    return Step(max(kept - paged + waiting, 0), forward, head, block, paged)


def _traced(plain: Plain, batch: Batch, again: bool, changed: bool) -> tuple[Step, int]:
    """A step of the first blocks, and what one block more would keep.

    changed    whether a block more would be changed; only the first is if not
    """
    with foreseeing(plain.recipe):
        return _trace(plain, batch, again, changed)


@contextmanager
def foreseeing(recipe: Recipe) -> Iterator[None]:
    """Inside, code follows tensors without numbers; what an architecture does not find there becomes a ModelError."""
    try:
        yield
    except VeneerError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{recipe.model}: a step cannot be followed without numbers, so its memory cannot be foreseen "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


class Followed:
    """The first blocks of a recipe's model with its change, all without numbers, and a ledger of what they compute."""

    def __init__(self, plain: Plain, blocks: int, alike: bool | None = None) -> None:
        self.model: Any = plain.model(blocks)
        self.change: Adapter = plain.change(self.model, alike)
        known = [*self.model.parameters(), *self.model.buffers(), *self.change.parameters()]
        known += [b for holder in self.change.holders().values() for b in holder.buffers()]
        self.ledger = Ledger(known)
        self.after: list[int] = []
        """What is alive when each block is done."""
        for block in blocks_of(self.model).values():
            attending_fused_(block)
            block.register_forward_hook(lambda *_: self.after.append(self.ledger.live))


def _trace(plain: Plain, batch: Batch, again: bool, alike: bool) -> tuple[Step, int]:
    """A step of `TRACED` blocks, each of them changed or only the first, and what one block more would keep."""
    seen = Followed(plain, TRACED, alike)
    model, ledger, after = seen.model, seen.ledger, seen.after
    for parameter in seen.change.parameters():  # gradients go into a buffer of their own as soon as they are there
        parameter.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
    seen.change.train()
    there, base = on_meta(batch), Base(model)
    with ledger, recomputing(base, again):
        hidden = hidden_states(base, there, packed=plain.recipe.data.packing)
        kept, forward = ledger.live, ledger.mark()
        last = range(TRACED - 1, len(after), TRACED)  # a prompt passes through the blocks first
        slope = sum(after[i] - after[i - 1] for i in last)
        two_chunks = there.targets[: 2 * chunk_rows(base)]  # more of them take no more
        backward(base, hidden.detach(), two_chunks, 1)
        head = ledger.mark()
        if hidden.requires_grad:  # not so where only the head is changed
            torch.autograd.backward(hidden, torch.zeros_like(hidden))
        block_bytes = ledger.mark()
    return Step(kept, max(forward - kept, 0), max(head - kept, 0), max(block_bytes - kept, 0)), slope


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def on_meta(batch: Batch) -> Batch:
    """The batch without its numbers; `starts` keeps them, as shapes depend on it."""
    ids, positions, supervised, targets = (
        t.to("meta") for t in (batch.input_ids, batch.position_ids, batch.supervised, batch.targets)
    )
    return Batch(ids, positions, batch.starts, supervised, targets)
