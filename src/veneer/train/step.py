"""One optimizer step: gradients of every micro-batch, summed, scaled by the step's supervised tokens, clipped."""

import time
from typing import Any

from veneer import machine
from veneer.data.pack import collate
from veneer.recipe.settings import Recipe
from veneer.train.backward import step_with
from veneer.train.checkpoint import TrainState
from veneer.train.optim.param_groups import set_learning_rates
from veneer.train.restarts import restart_steps
from veneer.train.schedule import multiplier
from veneer.train.setup import Job

ROUND = 64
"""Packed micro-batches are filled up to a multiple of so many tokens."""


def optimizer_step(recipe: Recipe, job: Job, state: TrainState) -> dict[str, Any]:
    """Make the next step; returns its figures.

    Raises TrainingError for a loss or gradient that is not finite and for a parameter the loss does not reach; the
    parameters are then as they were. Only with `optimizer.in_backward` and no limit on the norm, such a gradient or
    parameter is met when others were stepped already; the message of the former says so.
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
    loss, norm = step_with(recipe, job, state, batches)
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
