"""The training loop, in the order things happen."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp, isfinite
from typing import Any

import torch

from veneer import machine
from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.disk.run_dir import RunDir
from veneer.errors import TrainingError
from veneer.train.check import check_fast_paths
from veneer.train.events import Event, Listener, tensorboard
from veneer.train.held_out import mean_loss
from veneer.train.interrupt import interruptible
from veneer.train.loss import Head, backward, head_of, hidden_states
from veneer.train.optim import build_optimizer
from veneer.train.optim.groups import set_learning_rates
from veneer.train.prepare import Job, prepare
from veneer.train.recipe import write_recipe
from veneer.train.recompute import recomputing
from veneer.train.resume import TrainState, load_checkpoint, save_checkpoint
from veneer.train.schedule import multiplier
from veneer.train.settings import Recipe


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


def train(
    recipe: Recipe, listeners: Sequence[Listener] = (), say: Callable[[str], None] = lambda _: None
) -> tuple[Outcome, Job | None]:
    """Start a run, go on with it, or say what it came to; the job is None if nothing was left to do.

    listeners   are told of every step and evaluation
    say         is told what happens before the first step
    Ctrl-C and SIGTERM end it after the current step with a checkpoint, as KeyboardInterrupt.
    """
    run = RunDir(recipe.run)
    run.begin(write_recipe(recipe))
    figures = run.done()
    if figures is not None:
        say(f"{recipe.run} is done already")
        return Outcome(**figures), None
    torch.manual_seed(recipe.train.seed)
    job = prepare(recipe, say)
    state = TrainState(job.adapter, build_optimizer(job.adapter.named(), recipe.optimizer))
    checkpoint = run.newest_checkpoint()
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, job.data_hash)
        say(f"going on after step {state.step}")
    run.rewind(state.step)
    resumed_from = state.step if checkpoint is not None else None
    everybody = [lambda e: run.append(e.line()), *filter(None, [tensorboard(run.root / "tensorboard")]), *listeners]
    _steps(recipe, job, state, run, everybody)
    outcome = _finish(recipe, job, state, run, everybody, resumed_from)
    return outcome, job


def _steps(recipe: Recipe, job: Job, state: TrainState, run: RunDir, listeners: Sequence[Listener]) -> None:
    """Make every step that is left."""
    settings, total, head = recipe.train, len(job.plan), head_of(job.model)
    if state.step < total:
        check_fast_paths(job.model, job.examples, packed=recipe.data.packing)
    job.adapter.train()
    with interruptible() as interrupted, recomputing(job.model, settings.recompute):
        while state.step < total:
            began = time.perf_counter()
            scale = multiplier(state.step, steps=total, warmup=settings.warmup, schedule=settings.schedule)
            rates = set_learning_rates(state.optimizer, scale)
            figures = _step(recipe, job, state, head, job.plan[state.step])
            state.step += 1
            state.seconds += (spent := time.perf_counter() - began)
            memory = {"rss_bytes": machine.rss_bytes(), "tokens_per_second": figures["tokens"] / spent}
            _tell(listeners, Event("step", state.step, total, {**figures, **memory, "lr": rates, "seconds": spent}))
            if settings.eval_every and state.step % settings.eval_every == 0 and state.step < total:
                _evaluate(recipe, job, state, listeners)
            due = settings.checkpoint_every and state.step % settings.checkpoint_every == 0 and state.step < total
            if due or interrupted():
                save_checkpoint(run.checkpoint(state.step), state, job.data_hash)
                run.prune(settings.keep_checkpoints)
            if interrupted():
                raise KeyboardInterrupt


def _step(recipe: Recipe, job: Job, state: TrainState, head: Head, micro_batches: list[list[int]]) -> dict[str, Any]:
    """One optimizer step: gradients of every micro-batch, summed and scaled by the step's supervised tokens."""
    batches = [collate([job.examples[i] for i in members]) for members in micro_batches]
    supervised = sum(len(b.targets) for b in batches)
    words, loss = job.model.config.get_text_config().vocab_size, 0.0
    state.optimizer.zero_grad(set_to_none=True)
    for batch, members in zip(batches, micro_batches, strict=True):
        hidden = hidden_states(job.model, batch, packed=recipe.data.packing)
        part = backward(hidden, batch.targets, head, words, supervised)
        if not isfinite(part):
            raise TrainingError(_not_finite(state.step, part, [job.examples[i] for i in members]))
        loss += part
    norm = _clip(job, state, recipe.train.clip)
    state.optimizer.step()
    tokens = sum(b.input_ids.shape[1] for b in batches)
    state.tokens += tokens
    return {"loss": loss / supervised, "gradient_norm": norm, "tokens": tokens, "supervised": supervised}


def _clip(job: Job, state: TrainState, most: float) -> float:
    """The gradient's norm, after which it is at most `most`; a parameter the loss does not reach is an error."""
    named = job.adapter.named()
    unreached = [f"{n.path} {n.name}" for n in named if n.parameter.grad is None]
    if unreached:
        raise TrainingError(
            f"{len(unreached)} of {len(named)} parameters get no gradient, so they would never change: "
            f"{', '.join(unreached[:4])}; leave those modules out (method.exclude)"
        )
    norm = torch.nn.utils.clip_grad_norm_([n.parameter for n in named], most or float("inf"))
    if not isfinite(float(norm)):
        raise TrainingError(f"step {state.step + 1}: the gradient's norm is {float(norm)}; try a lower optimizer.lr")
    return float(norm)


def _evaluate(recipe: Recipe, job: Job, state: TrainState, listeners: Sequence[Listener]) -> float:
    """Mean loss a supervised token over the held-out examples, in nats."""
    began = time.perf_counter()
    value = mean_loss(job.model, job.held_out, recipe) if job.held_out else float("nan")
    job.adapter.train()
    figures = {"loss": value, "perplexity": exp(min(value, 700.0)), "seconds": time.perf_counter() - began}
    if job.held_out:
        _tell(listeners, Event("evaluation", state.step, len(job.plan), figures))
    return value


def _finish(
    recipe: Recipe, job: Job, state: TrainState, run: RunDir, listeners: Sequence[Listener], resumed_from: int | None
) -> Outcome:
    """The last evaluation, the adapter's folder, the figures; from then on the run is done."""
    job.adapter.eval()
    value = _evaluate(recipe, job, state, listeners) if job.held_out else None
    losses = [e["loss"] for e in run.read_events() if e["event"] == "step"]
    last = losses[-max(1, len(losses) // 10) :]
    facts = {
        "recipe": recipe.model_dump(mode="json"),
        "data": {"sha256": job.data_hash, "rows": len(job.examples)},
        "metrics": {"loss": sum(last) / len(last), "eval_loss": value},
    }
    outcome = Outcome(
        adapter=str(run.adapter),
        adapter_bytes=job.adapter.save(run.adapter, facts),
        steps=state.step,
        seconds=state.seconds,
        peak_bytes=machine.peak_rss_bytes(),
        loss=sum(last) / len(last),
        tokens_per_second=state.tokens / state.seconds,
        trained_parameters=job.adapter.n_params(),
        eval_loss=value,
        resumed_from=resumed_from,
    )
    run.finish(asdict(outcome))
    return outcome


def _tell(listeners: Sequence[Listener], event: Event) -> None:
    for listener in listeners:
        listener(event)


def _not_finite(step: int, loss: float, examples: Sequence[Example]) -> str:
    rows = ", ".join(f"{e.source}:{e.line}" for e in examples[:8])
    return (
        f"step {step + 1}: the loss is {loss}, in a micro-batch of the rows {rows}; look at those rows, or try a lower "
        "optimizer.lr. The last checkpoint is whole."
    )
