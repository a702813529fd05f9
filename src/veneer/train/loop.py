"""The training loop, in the order things happen."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import exp
from typing import Any

import torch

from veneer import machine
from veneer.disk.run_dir import RunDir
from veneer.disk.scratch import clear_scratch
from veneer.recipe.load import respelled, write_recipe
from veneer.recipe.overrides import Changes, differences, with_changes
from veneer.recipe.settings import Recipe
from veneer.train.activation_checkpointing import recomputing
from veneer.train.activation_offload import paged_inputs
from veneer.train.checkpoint import TrainState, begun_in, load_checkpoint, save_checkpoint
from veneer.train.eval_loss import mean_loss
from veneer.train.events import Event, Listener, tensorboard
from veneer.train.interrupt import interruptible
from veneer.train.loss_selftest import check_fast_paths
from veneer.train.optim import build_optimizer
from veneer.train.restarts import Restarts
from veneer.train.setup import Check, Job, prepare, unchecked, with_dtype
from veneer.train.step import optimizer_step


@dataclass(frozen=True)
class Outcome:
    """What a finished run is."""

    adapter: str
    """Its folder."""
    adapter_bytes: int
    steps: int
    seconds: float
    """In training, over all sessions of the run, without loading."""
    peak_bytes: int
    """Largest resident memory of the process."""
    loss: float
    """Mean over the last tenth of the steps, in nats a token."""
    tokens_per_second: float
    trained_parameters: int
    eval_loss: float | None = None
    resumed_from: int | None = None
    """The step that this session went on from."""
    picked: Changes = field(default_factory=dict)
    """What `memory.auto` changed: dotted key -> value."""


def train(
    recipe: Recipe,
    listeners: Sequence[Listener] = (),
    say: Callable[[str], None] = lambda _: None,
    check: Check = unchecked,
) -> tuple[Outcome, Job | None]:
    """Start a run, go on with it, or say what it came to; the job is None if nothing was left to do.

    listeners   are told of every step and evaluation
    say         is told what happens before the first step
    check       may refuse the job before its weights are read, or pick for a recipe with `memory.auto`
    Ctrl-C and SIGTERM end it after the current step with a checkpoint, as KeyboardInterrupt.
    """
    recipe = with_dtype(recipe)
    run = RunDir(recipe.run)
    with run.locked():
        fixed = run.trained()
        recipe = with_changes(recipe, run.picked()) if fixed and recipe.memory.auto else recipe
        run.begin(write_recipe(recipe), respelled)
        clear_scratch(run.root)
        figures = run.done()
        if figures is not None:
            say(f"{recipe.run} is done already")
            return Outcome(**figures), None
        torch.manual_seed(recipe.train.seed)
        checkpoint = run.newest_checkpoint()
        job = prepare(recipe, say, None if checkpoint is None else begun_in(checkpoint), check, fixed)
        if not fixed:
            run.pick(differences(recipe, job.recipe))
            run.begin(write_recipe(job.recipe))
        recipe = job.recipe
        state = TrainState(job.adapter, build_optimizer(job.adapter.named(), recipe.optimizer, run.root))
        check_fast_paths(job.model, job.examples, packed=recipe.data.packing)
        if checkpoint is not None:
            differs = load_checkpoint(checkpoint, state, job.data_hash)
            say(f"going on after step {state.step}" + (f"; {differs}" if differs else ""))
        run.rewind(state.step)
        own = [lambda e: run.append(e.line()), tensorboard(run.root / "tensorboard", after=state.step)]
        resumed_from = state.step if checkpoint is not None else None
        _steps(recipe, job, state, run, [*filter(None, own), *listeners])
        return _finish(job, state, run, resumed_from), job


def _steps(recipe: Recipe, job: Job, state: TrainState, run: RunDir, listeners: Sequence[Listener]) -> None:
    """Make every step that is left."""
    settings, total = recipe.train, len(job.plan)
    restarts = Restarts(recipe, job.adapter, total)
    with (
        interruptible() as interrupted,
        paged_inputs(recipe, job, run.root) as inputs,
        recomputing(job.model, settings.recompute, inputs),
        restarts.folded(),
    ):
        while state.step < total:
            if restarts.due(state.step):
                _tell(listeners, Event("restart", state.step, total, restarts.restart_(state.optimizer, state.step)))
            job.adapter.train()
            figures = optimizer_step(recipe, job, state)
            job.adapter.eval()
            _tell(listeners, Event("step", state.step, total, figures))
            if job.held_out and (state.step == total or _due(state.step, settings.eval_every)):
                _tell(listeners, Event("evaluation", state.step, total, _evaluated(job, recipe)))
            if interrupted() or (state.step < total and _due(state.step, settings.checkpoint_every)):
                save_checkpoint(run.checkpoint(state.step), state, job.data_hash)
                run.prune(settings.keep_checkpoints)
            if interrupted():
                raise KeyboardInterrupt


def _finish(job: Job, state: TrainState, run: RunDir, resumed_from: int | None) -> Outcome:
    """The adapter's folder and the figures; from then on the run is done."""
    events = run.read_events()
    losses = [e["loss"] for e in events if e["event"] == "step"]
    last = losses[-max(1, len(losses) // 10) :]
    loss = sum(last) / len(last) if last else float("nan")  # only if someone removed the events
    eval_loss = next((e["loss"] for e in reversed(events) if e["event"] == "evaluation"), None)
    facts = {
        "recipe": job.recipe.model_dump(mode="json"),
        "data": {"sha256": job.data_hash, "rows": len(job.examples), "layouts": job.report.layouts},
        "metrics": {"loss": loss, "eval_loss": eval_loss},
    }
    outcome = Outcome(
        adapter=str(run.adapter),
        adapter_bytes=job.adapter.save(run.adapter, facts),
        steps=state.step,
        seconds=state.seconds,
        peak_bytes=machine.peak_rss_bytes(),
        loss=loss,
        tokens_per_second=state.tokens / state.seconds,
        trained_parameters=job.adapter.n_params(),
        eval_loss=eval_loss,
        resumed_from=resumed_from,
        picked=run.picked(),
    )
    run.finish(asdict(outcome))
    return outcome


def _evaluated(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Figures over the held-out examples; the loss is the mean a supervised token, in nats."""
    began = time.perf_counter()
    value = mean_loss(job.model, job.held_out, recipe)
    return {"loss": value, "perplexity": exp(min(value, 700.0)), "seconds": time.perf_counter() - began}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _tell(listeners: Sequence[Listener], event: Event) -> None:
    for listener in listeners:
        listener(event)
