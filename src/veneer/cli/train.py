"""Train an adapter from a recipe, or resume an interrupted run."""

import time
from dataclasses import asdict
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from veneer.cli.console import AsJson, emit_json, remark, say, stderr
from veneer.errors import ConfigError
from veneer.recipe.load import keys, load_recipe, parse_flags
from veneer.train.events import Event
from veneer.units import format_bytes, format_seconds

INDENT = " " * 6
SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "epilog": "Every key of a recipe is a flag; `method` has more of its own (--method.rank 16, ...).\n\n\b\n"
    + "\n".join(f"--{k}\n{fill(v, 76, initial_indent=INDENT, subsequent_indent=INDENT)}" for k, v in keys().items()),
}


def command(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    force: Annotated[bool, typer.Option("--force", help="Train even if the memory or disk will not do.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter. The same command starts a run, resumes it, or prints the result if it is finished.

    Example:

        veneer train recipe.yaml --train.epochs 2 --optimizer.lr 1e-3
    """
    from veneer.base.device import find_device
    from veneer.plan.fit import fit
    from veneer.train.job import read_job
    from veneer.train.preflight import preflight
    from veneer.train.run import open_run
    from veneer.train.setup import set_up

    if recipe.startswith("--"):
        raise ConfigError(f"the recipe comes first: veneer train RECIPE {recipe} ...")
    settings = load_recipe(recipe, parse_flags(context.args))
    find_device(settings.device).add_up_in_one_order()
    try:
        with open_run(settings, remark) as session, TrainProgress() as progress:
            run = session.finished
            if run is None:
                job = read_job(session.recipe, remark)
                checked = preflight(job, session.init)
                checked = fit(checked, fixed=session.fixed, force=force, say=remark)
                training = set_up(checked, session.init, remark)
                run = session.train(training, [progress], remark)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command resumes the run in {settings.run}.") from None
    if as_json:
        emit_json(asdict(run))
        return
    lines = [
        f"{run.steps} steps in {format_seconds(run.seconds)} ({run.tokens_per_second:.0f} tokens/s), "
        f"loss {run.loss:.4f}"
        + (f", evaluation loss {run.eval_loss:.4f}" if run.eval_loss is not None else "")
        + f", peak memory {format_bytes(run.peak_bytes)}",
        *[f"memory.auto picked {key} {value}" for key, value in run.picked.items()],
        f"adapter: {run.adapter} ({format_bytes(run.adapter_bytes)})",
    ]
    say("\n".join(lines))


class TrainProgress:
    """Listens to a run: a live bar on a terminal, a line a minute elsewhere; all on stderr."""

    def __init__(self) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
        self._live = stderr.is_terminal
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr)
        self._task: Any = None
        self._last_line = float("-inf")

    def __enter__(self) -> "TrainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        f = event.figures
        if event.kind == "restart":
            remark(
                f"step {event.step}: restart, cycle {f['cycle']} begins; {f['pruned']:.1%} of the moments are zero, "
                f"{f['rounding_of_change']:.2g} of the change was rounded away"
            )
            return
        if event.kind == "evaluation":
            remark(f"step {event.step}: evaluation loss {f['loss']:.4f}, perplexity {f['perplexity']:.2f}")
            return
        now = f"loss {f['loss']:.3f}  {f['tokens_per_second']:.0f} tokens/s  {format_bytes(f['rss_bytes'])}"
        if self._live:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task("training", total=event.steps, now=now)
            self._bar.update(self._task, completed=event.step, now=now)
        elif event.step == event.steps or time.monotonic() - self._last_line > 60:
            self._last_line = time.monotonic()
            remark(f"step {event.step}/{event.steps}: {now}")
