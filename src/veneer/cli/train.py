"""Train an adapter from a recipe, or go on with an interrupted run."""

import time
from dataclasses import asdict
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from veneer.cli.console import AsJson, emit_json, remark, stderr, stdout
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
    """Train an adapter. The same command starts a run, goes on with it after an interruption, or says it is done.

    Example:

        veneer train recipe.yaml --train.epochs 2 --optimizer.lr 1e-3
    """
    from veneer.plan.gate import refusing
    from veneer.train.loop import train

    if recipe.startswith("--"):
        raise ConfigError(f"the recipe comes first: veneer train RECIPE {recipe} ...")
    settings = load_recipe(recipe, parse_flags(context.args))
    try:
        with TrainProgress() as progress:
            outcome, _ = train(settings, [progress], remark, refusing(remark, force=force))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command goes on with the run in {settings.run}.") from None
    if as_json:
        emit_json(asdict(outcome))
        return
    lines = [
        f"{outcome.steps} steps in {format_seconds(outcome.seconds)} ({outcome.tokens_per_second:.0f} tokens/s), "
        f"loss {outcome.loss:.4f}"
        + (f", evaluation loss {outcome.eval_loss:.4f}" if outcome.eval_loss is not None else "")
        + f", peak memory {format_bytes(outcome.peak_bytes)}",
        *[f"memory.auto picked {key} {value}" for key, value in outcome.picked.items()],
        f"adapter: {outcome.adapter} ({format_bytes(outcome.adapter_bytes)})",
    ]
    stdout.print("\n".join(lines), markup=False, soft_wrap=True)


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
