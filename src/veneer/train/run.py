"""The life of a run: lock its folder, resume, keep what was picked, train, and finish.

with open_run(recipe, say) as session:
    job = read_job(session.recipe, say)                      rows and steps
    checked = preflight(job, session.init)                   all that can be wrong, before any weight is read
    training = set_up(checked, session.init, say)            base and adapter
    run = session.train(training, listeners, say)            steps, adapter folder, figures
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from veneer.disk.run_dir import RunDir
from veneer.disk.scratch import clear_scratch
from veneer.errors import ConfigError
from veneer.recipe.load import respelled, write_recipe
from veneer.recipe.overrides import Changes, differences, with_changes
from veneer.recipe.settings import Recipe
from veneer.train.checkpoint import TrainState, init_state_in, load_checkpoint
from veneer.train.events import Listener, tensorboard
from veneer.train.job import Say, read_job, with_dtype
from veneer.train.loop import make_steps
from veneer.train.optim import build_optimizer
from veneer.train.preflight import InitState, preflight
from veneer.train.setup import Training, set_up


@dataclass(frozen=True)
class Run:
    """The figures of a finished run."""

    adapter: str
    """Its adapter's folder."""
    adapter_bytes: int
    steps: int
    seconds: float
    """In training, over all sessions of the run, without loading."""
    peak_bytes: int
    """Largest memory of the device; on a CPU the process's resident set."""
    loss: float
    """Mean over the last tenth of the steps, in nats a token."""
    tokens_per_second: float
    trained_parameters: int
    eval_loss: float | None = None
    resumed_from: int | None = None
    """The step that the last session continued from."""
    picked: Changes = field(default_factory=dict)
    """What `memory.auto` changed: dotted key -> value."""
    folder: str = ""
    """The run's folder."""


@dataclass(frozen=True)
class Session:
    """A run's folder while this process holds its lock."""

    folder: RunDir
    recipe: Recipe
    """With what was picked when the run began."""
    fixed: bool
    """A step was made earlier, so the recipe stays."""
    finished: Run | None = None
    """The figures of a run that is done; nothing is left to do then."""

    @property
    def init(self) -> InitState | None:
        """What the method settled from data when the run began."""
        checkpoint = self.folder.newest_checkpoint()
        return None if checkpoint is None else init_state_in(checkpoint)

    def train(self, training: Training, listeners: Sequence[Listener] = (), say: Say = lambda _: None) -> Run:
        """Make the steps that are left, write the adapter and mark the run as done; returns its figures."""
        job, folder, checkpoint = training.job, self.folder, self.folder.newest_checkpoint()
        if not self.fixed:
            folder.pick(differences(self.recipe, job.recipe))
            folder.begin(write_recipe(job.recipe))
        optimizer = build_optimizer(training.adapter.named(), job.recipe.optimizer, folder.root)
        state = TrainState(training.base, training.adapter, optimizer)
        job.task.selftest(training.base, job.examples, packed=job.recipe.data.packing)
        if checkpoint is not None:
            differs = load_checkpoint(checkpoint, state, job.data_hash)
            say(f"resuming after step {state.step}" + (f"; {differs}" if differs else ""))
        folder.rewind(state.step)
        own = [lambda e: folder.append(e.line()), tensorboard(folder.root / "tensorboard", after=state.step)]
        resumed_from = state.step if checkpoint is not None else None
        make_steps(training, state, folder, [*filter(None, own), *listeners])
        return self._finish(training, state, resumed_from)

    def _finish(self, training: Training, state: TrainState, resumed_from: int | None) -> Run:
        """Write the adapter's folder and the figures, which mark the run as done."""
        job, folder, events = training.job, self.folder, self.folder.read_events()
        losses = [e["loss"] for e in events if e["event"] == "step"]
        last = losses[-max(1, len(losses) // 10) :]
        loss = sum(last) / len(last) if last else float("nan")  # only if someone removed the events
        eval_loss = next((e["loss"] for e in reversed(events) if e["event"] == "evaluation"), None)
        facts = {
            "recipe": job.recipe.tree(),
            "data": {"sha256": job.data_hash, "rows": len(job.examples), "layouts": job.report.layouts},
            "metrics": {"loss": loss, "eval_loss": eval_loss},
        }
        run = Run(
            adapter=str(folder.adapter),
            adapter_bytes=training.adapter.save(folder.adapter, facts),
            steps=state.step,
            seconds=state.seconds,
            peak_bytes=training.base.device.peak_bytes(),
            loss=loss,
            tokens_per_second=state.tokens / state.seconds,
            trained_parameters=training.adapter.n_params(),
            eval_loss=eval_loss,
            resumed_from=resumed_from,
            picked=folder.picked(),
            folder=str(folder.root),
        )
        training.adapter.facts = facts
        folder.finish(asdict(run))
        return run


@contextmanager
def open_run(recipe: Recipe, say: Say = lambda _: None) -> Iterator[Session]:
    """Lock the run's folder, or make it; inside, no other process trains there.

    Raises ConfigError if another process does, or if the folder holds a run of another recipe or other files.
    """
    recipe = with_dtype(recipe)
    folder = RunDir(recipe.run)
    with folder.locked():
        fixed = folder.trained()
        recipe = with_changes(recipe, folder.picked()) if fixed and recipe.memory.auto else recipe
        folder.begin(write_recipe(recipe), respelled)
        clear_scratch(folder.root)
        figures = folder.done()
        if figures is not None:
            say(f"{recipe.run} is done already")
            yield Session(folder, recipe, fixed, Run(**{"folder": str(folder.root), **figures}))
            return
        torch.manual_seed(recipe.train.seed)
        yield Session(folder, recipe, fixed)


def train_recipe(
    recipe: Recipe, listeners: Sequence[Listener] = (), say: Say = lambda _: None
) -> tuple[Run, Training | None]:
    """Start or resume a run; return the stored figures, and no training, if it is finished.

    Ctrl-C and SIGTERM end it after the current step with a checkpoint, as KeyboardInterrupt.
    """
    with open_run(recipe, say) as session:
        if session.finished is not None:
            return session.finished, None
        refuse_picking(session)
        checked = preflight(read_job(session.recipe, say), session.init)
        training = set_up(checked, session.init, say)
        return session.train(training, listeners, say), training


def refuse_picking(session: Session) -> None:
    """Raise ConfigError where `memory.auto` would have to pick: that is for veneer.plan, which train does not know."""
    if session.recipe.memory.auto and not session.fixed:
        raise ConfigError(
            "memory.auto is true, but train picks nothing by itself: set it to false, or call veneer.plan.fit.fit "
            "between veneer.train.preflight.preflight and veneer.train.setup.set_up"
        )
