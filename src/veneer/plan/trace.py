"""Trace what a step, an evaluation and a save hold in memory: the code that trains runs on tensors without data.

A step is traced on the first few blocks and extrapolated to all of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from veneer.base.memory_tracker import MemoryTracker
from veneer.base.meta import traceable
from veneer.data.example import Example
from veneer.data.pack import Batch, collate
from veneer.methods.restartable import restartable
from veneer.plan.meta_model import TargetBlocks, short_model
from veneer.tasks.base import held_out_batches
from veneer.tasks.causal_lm import ROUND
from veneer.tasks.lm_loss import backward, chunk_rows, hidden_states
from veneer.train.activation_checkpointing import recomputing
from veneer.train.activation_offload import BEHIND
from veneer.train.job import BatchPlan, held_out_settings
from veneer.train.preflight import Checked
from veneer.train.restarts import restart_steps

TRACED = 3
"""Blocks."""
IN_FLIGHT = BEHIND + 2
"""Offloaded tensors in memory: those waiting to be written, one in use, one read ahead."""


@dataclass(frozen=True)
class Step:
    """Bytes of one micro-batch."""

    kept: int
    """Saved by the blocks, from the forward pass to the backward pass."""
    forward: int
    """Beyond that in the forward pass, while one block is computed."""
    head: int
    """Beyond what is kept while the loss is computed, in chunks."""
    block: int
    """Beyond it in the backward pass, while one block is recomputed and differentiated."""
    paged: int = 0
    """Kept on disk instead."""


def step_bytes(checked: Checked) -> list[Step]:
    """What the largest micro-batches of the run hold."""
    batches = largest_batches(checked, checked.job.examples, checked.job.steps, rounded=True)
    return [batch_bytes(checked, batch, len(checked.meta.blocks)) for batch in batches]


def evaluation_bytes(checked: Checked) -> list[Step]:
    """What the largest held-out micro-batches hold; empty without held-out rows."""
    rows, more = checked.job.held_out, len(checked.meta.blocks) - TRACED
    if not rows:
        return []
    order = [held_out_batches(rows, **held_out_settings(checked.recipe))]
    return [_evaluated(checked, batch, more) for batch in largest_batches(checked, rows, order, rounded=False)]


def largest_batches(checked: Checked, examples: Sequence[Example], steps: BatchPlan, *, rounded: bool) -> list[Batch]:
    """The micro-batches that may need most: of the most tokens, and of the largest attention.

    rounded    packed ones are padded, as in training
    """
    members = {tuple(m) for step in steps for m in step}
    longest = {m: max(len(examples[i]) for i in m) for m in members}
    tokens = {m: sum(len(examples[i]) for i in m) for m in members}
    chosen = {max(members, key=lambda m: (tokens[m], m)), max(members, key=lambda m: (len(m) * longest[m] ** 2, m))}
    multiple = ROUND if checked.recipe.data.packing and rounded else 1
    return [collate([examples[i] for i in m], multiple) for m in sorted(chosen)]


def batch_bytes(checked: Checked, batch: Batch, blocks: int) -> Step:
    """What `batch` holds in a model of `blocks` blocks."""
    recipe, wanted, places = checked.recipe, checked.recipe.train.recompute, TargetBlocks.of(checked)
    recomputed = range(blocks if wanted is True else wanted) if isinstance(wanted, int) else wanted
    counts = Counter((i in recomputed, places.targeted(i)) for i in range(places.first, blocks))
    traced = {kind: _trained(checked, batch, *kind) for kind in counts or [(False, True)]}
    slopes = {kind: slope for kind, (_, slope) in traced.items()}
    alike = [kind for kind in traced if kind[1]] or list(traced)
    outside = max(traced[kind][0].kept - TRACED * slopes[kind] for kind in alike)
    kept = outside + sum(slopes[kind] * n for kind, n in counts.items())
    inputs = {kind: slope for kind, slope in slopes.items() if kind[0] and recipe.memory.page_activations}
    paged = sum(slope * counts[kind] for kind, slope in inputs.items())
    waiting = min(paged, IN_FLIGHT * max(inputs.values(), default=0))
    forward, head, block = (max(getattr(t, part) for t, _ in traced.values()) for part in ("forward", "head", "block"))
    return Step(max(kept - paged + waiting, 0), forward, head, block, paged)


class TracedModel:
    """The first blocks on the meta device with the job's adapter, and a tracker of the memory they compute with."""

    def __init__(self, checked: Checked, blocks: int, *, all_targeted: bool = True) -> None:
        self.base, self.adapter = short_model(checked, blocks, all_targeted=all_targeted)
        known = [*self.base.network.parameters(), *self.base.network.buffers(), *self.adapter.parameters()]
        known += [b for holder in self.adapter.holders().values() for b in holder.buffers()]
        self.tracker = MemoryTracker(known)
        self.after: list[int] = []
        """Bytes alive after each block."""
        for block in self.base.blocks.values():
            use_fused_attention_(block)
            block.register_forward_hook(lambda *_: self.after.append(self.tracker.live))


def _trained(checked: Checked, batch: Batch, recompute: bool, all_targeted: bool) -> tuple[Step, int]:
    """A step of `TRACED` blocks, and what one more block would keep."""
    with traceable(checked.recipe.model):
        traced = TracedModel(checked, TRACED, all_targeted=all_targeted)
        base, tracker = traced.base, traced.tracker
        for parameter in traced.adapter.parameters():  # training moves gradients into a buffer of their own at once
            parameter.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
        traced.adapter.train()
        there = on_meta(batch)
        with tracker, recomputing(base, recompute):
            hidden = hidden_states(base, there, packed=checked.recipe.data.packing)
            kept, forward = tracker.live, tracker.mark()
            last = range(TRACED - 1, len(traced.after), TRACED)  # a prompt passes through the blocks first
            slope = sum(traced.after[i] - traced.after[i - 1] for i in last)
            two_chunks = there.targets[: 2 * chunk_rows(base)]  # more chunks need no more memory
            backward(base, hidden.detach(), two_chunks, 1)
            head = tracker.mark()
            if hidden.requires_grad:  # not if only the head is trained
                torch.autograd.backward(hidden, torch.zeros_like(hidden))
            block = tracker.mark()
    return Step(kept, max(forward - kept, 0), max(head - kept, 0), max(block - kept, 0)), slope


def _evaluated(checked: Checked, batch: Batch, more: int) -> Step:
    """An evaluation of `batch`, which keeps nothing but a prefix; `more` blocks than are traced."""
    with traceable(checked.recipe.model):
        traced = TracedModel(checked, TRACED)
        at_head: list[tuple[int, int]] = []

        def reached(*_: Any) -> None:
            if not at_head:
                at_head.append((traced.tracker.live, traced.tracker.mark()))

        traced.base.head.register_forward_pre_hook(reached)
        traced.adapter.eval()
        with traced.tracker:
            checked.job.task.summed_loss(traced.base, on_meta(batch), packed=checked.recipe.data.packing)
    kept, forward = at_head[0]
    slope = traced.after[-1] - traced.after[-2]  # keys and values of a prefix
    return Step(kept + slope * more, forward - kept, traced.tracker.peak - kept, 0)


def saved_copies(checked: Checked) -> int:
    """Bytes of the tensors made for writing the adapter, after all restarts of the run.

    Checkpoints are written from views; some methods compute the tensors of their adapter folder.
    """
    with traceable(checked.recipe.model):
        traced = TracedModel(checked, 1)
        deltas = traced.adapter.deltas.values()
        with traced.tracker:
            for _ in restart_steps(checked.recipe.restarts, len(checked.job.steps)):
                for delta in restartable(traced.adapter.deltas).values():
                    delta.remember_()
                    delta.restart_(torch.Generator())
            before = traced.tracker.live
            written = [delta.tensors() for delta in deltas]  # a prompt's table is written as it is
            copied = traced.tracker.live - before
        del written
    return round(copied * checked.adapter.n_params() / traced.adapter.n_params())


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def on_meta(batch: Batch) -> Batch:
    """The batch without data; `starts` keeps its values, as shapes depend on them."""
    ids, positions, supervised, targets = (
        t.to("meta") for t in (batch.input_ids, batch.position_ids, batch.supervised, batch.targets)
    )
    return Batch(ids, positions, batch.starts, supervised, targets)


def use_fused_attention_(block: Any) -> None:
    """Run the block's attention fused, in the backward pass too, where no mode around the call would be active."""
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with FusedAttention():
            return forward(*args, **kwargs)

    block.forward = run


class FusedAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` on the meta device saves what torch's fused kernel saves on a CPU.

    These are its inputs, its output, and a float32 for each row and head; torch itself would save all scores there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _Fused.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """q (B, H, T, E), k (B, K, T, E), v (B, K, T, F) -> (B, H, T, F)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
