"""One optimizer step: gradients of every micro-batch, summed, scaled by the step's supervised positions, clipped."""

import time
from typing import Any

from veneer.train.backward import backward_and_step
from veneer.train.checkpoint import TrainState
from veneer.train.optim.param_groups import set_learning_rates
from veneer.train.restarts import restart_steps
from veneer.train.schedule import multiplier
from veneer.train.setup import Training


def optimizer_step(training: Training, state: TrainState) -> dict[str, Any]:
    """Make the next step; returns its figures.

    Raises TrainingError for a loss or gradient that is not finite and for a parameter the loss does not reach; the
    parameters are then as they were.  Only with `optimizer.in_backward` and no limit on the norm can others have been
    stepped before such a gradient is found; the message says so.
    """
    began = time.perf_counter()
    job, base, adapter = training.job, training.base, training.adapter
    settings, micro_batches = job.recipe.train, job.steps[state.step]
    scale = multiplier(
        state.step,
        steps=len(job.steps),
        warmup=settings.warmup,
        schedule=settings.schedule,
        floor=settings.floor,
        restarts=restart_steps(job.recipe.restarts, len(job.steps)),
        rewarm=job.recipe.restarts.warmup_steps,
    )
    rates = set_learning_rates(state.optimizer, scale)
    examples = [[job.examples[i] for i in members] for members in micro_batches]
    batches = [job.task.batch(members, base, rounded=job.recipe.data.packing) for members in examples]
    supervised = sum(len(b.targets) for b in batches)
    loss, norm = backward_and_step(training, state, batches)
    adapter.stepped_(state.step + 1, len(job.steps))
    tokens = sum(len(example) for members in examples for example in members)
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
        "rss_bytes": base.device.used_bytes(),
    }
