"""The training loop, in the order things happen."""

import time
from collections.abc import Sequence
from typing import Any

from veneer.disk.run_dir import RunDir
from veneer.train.activation_checkpointing import recomputing
from veneer.train.activation_offload import paged_inputs
from veneer.train.checkpoint import TrainState, save_checkpoint
from veneer.train.events import Event, Listener
from veneer.train.interrupt import interruptible
from veneer.train.job import held_out_settings
from veneer.train.restarts import Restarts
from veneer.train.setup import Training
from veneer.train.step import optimizer_step


def make_steps(training: Training, state: TrainState, run: RunDir, listeners: Sequence[Listener]) -> None:
    """Make every step left; Ctrl-C and SIGTERM end it after the current one with a checkpoint, as KeyboardInterrupt."""
    job, adapter, total = training.job, training.adapter, len(training.job.steps)
    settings = job.recipe.train
    restarts = Restarts(job.recipe, adapter, total)
    with (
        interruptible() as interrupted,
        paged_inputs(training.job, training.base, run.root) as inputs,
        recomputing(training.base, settings.recompute, inputs),
        restarts.folded(),
    ):
        while state.step < total:
            if restarts.due(state.step):
                _tell(listeners, Event("restart", state.step, total, restarts.restart_(state.optimizer, state.step)))
            adapter.train()
            figures = optimizer_step(training, state)
            adapter.eval()
            _tell(listeners, Event("step", state.step, total, figures))
            if job.held_out and (state.step == total or _due(state.step, settings.eval_every)):
                _tell(listeners, Event("evaluation", state.step, total, evaluate_held_out(training)))
            if interrupted() or (state.step < total and _due(state.step, settings.checkpoint_every)):
                save_checkpoint(run.checkpoint(state.step), state, job.data_hash)
                run.prune(settings.keep_checkpoints)
            if interrupted():
                raise KeyboardInterrupt


def evaluate_held_out(training: Training) -> dict[str, Any]:
    """Figures over the held-out examples; the loss is the mean of a supervised position, in nats."""
    began, job = time.perf_counter(), training.job
    measured = job.task.held_out_loss(training.base, job.held_out, **held_out_settings(job.recipe))
    return {"loss": measured.mean, "perplexity": measured.perplexity, "seconds": time.perf_counter() - began}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _tell(listeners: Sequence[Listener], event: Event) -> None:
    for listener in listeners:
        listener(event)
