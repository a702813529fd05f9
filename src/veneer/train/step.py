"""One optimizer step: gradients of every micro-batch, summed, scaled by the step's supervised tokens, clipped."""

import time
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch

from veneer import machine
from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.errors import TrainingError
from veneer.train.loss import backward, head_of, hidden_states
from veneer.train.optim.groups import set_learning_rates
from veneer.train.prepare import Job
from veneer.train.restarts import restart_steps
from veneer.train.resume import TrainState
from veneer.train.schedule import multiplier
from veneer.train.settings import Recipe

ROUND = 64
"""Packed micro-batches are filled up to a multiple of so many tokens."""


def optimizer_step(recipe: Recipe, job: Job, state: TrainState) -> dict[str, Any]:
    """Make the next step; returns its figures.

    Raises TrainingError for a loss or gradient that is not finite and for a parameter the loss does not reach; the
    parameters are then as they were.
    """
    began = time.perf_counter()
    settings, micro_batches = recipe.train, job.plan[state.step]
    scale = multiplier(
        state.step,
        steps=len(job.plan),
        warmup=settings.warmup,
        schedule=settings.schedule,
        floor=settings.floor,
        restarts=restart_steps(recipe.restarts, len(job.plan)),
        rewarm=recipe.restarts.warmup_steps,
    )
    rates = set_learning_rates(state.optimizer, scale)
    multiple = ROUND if recipe.data.packing else 1
    batches = [collate([job.examples[i] for i in members], multiple) for members in micro_batches]
    supervised = sum(len(b.targets) for b in batches)
    head, words, loss = head_of(job.model), job.model.config.get_text_config().vocab_size, 0.0
    state.optimizer.zero_grad(set_to_none=True)
    for batch, members in zip(batches, micro_batches, strict=True):
        hidden = hidden_states(job.model, batch, packed=recipe.data.packing)
        part = backward(hidden, batch.targets, head, words, supervised)
        if not isfinite(part):
            raise TrainingError(_not_finite(state.step, part, [job.examples[i] for i in members]))
        loss += part
    penalty = job.adapter.penalty()
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    norm = _clip(job, state, settings.clip)
    state.optimizer.step()
    job.adapter.stepped_(state.step + 1, len(job.plan))
    tokens = sum(len(job.examples[i]) for members in micro_batches for i in members)
    spent = time.perf_counter() - began
    state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + spent
    return {
        "loss": loss / supervised,
        "gradient_norm": norm,
        "lr": rates,
        "tokens": tokens,
        "supervised": supervised,
        "seconds": spent,
        "tokens_per_second": tokens / spent,
        "rss_bytes": machine.rss_bytes(),
    }


def _clip(job: Job, state: TrainState, most: float) -> float:
    """The gradient's norm, after which it is at most `most`; a parameter the loss does not reach is an error."""
    named = job.adapter.named()
    unreached = [f"{n.path} {n.name}" for n in named if n.parameter.grad is None]
    if unreached:
        raise TrainingError(
            f"{len(unreached)} of {len(named)} parameters get no gradient, so they would never change: "
            f"{', '.join(unreached[:4])}; leave those modules out (method.exclude)"
        )
    norm = float(torch.nn.utils.clip_grad_norm_([n.parameter for n in named], most or float("inf")))
    if not isfinite(norm):
        raise TrainingError(f"step {state.step + 1}: the gradient's norm is {norm}; try a lower optimizer.lr")
    return norm


def _not_finite(step: int, loss: float, examples: Sequence[Example]) -> str:
    rows = ", ".join(f"{e.source}:{e.line}" for e in examples[:8])
    return (
        f"step {step + 1}: the loss is {loss}, in a micro-batch of the rows {rows}; look at those rows, or try a lower "
        "optimizer.lr. The last checkpoint is whole."
    )
