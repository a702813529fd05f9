"""How far a long piece of work is, on stderr: a bar on a terminal, elsewhere a line a minute; short work is silent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET = 2.0  # seconds of work before anything is shown
EVERY = 60.0  # seconds between lines where there is no terminal


@contextmanager
def showing(
    what: str, total: int, console: Console | None = None, clock: Callable[[], float] = monotonic
) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many more of `total` are done; `what` is a word like "rendering rows"."""
    console = console or Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=total)
    began = said = clock()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, said
        done, now = done + more, clock()
        bar.update(task, completed=done)
        if console.is_terminal:
            if now - began > QUIET:
                bar.start()
        elif now - said >= EVERY:
            console.print(f"{what}: {done} of {total} after {now - began:.0f} s")
            said = now

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
