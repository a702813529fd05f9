"""The command `veneer`: finds the verb's file, runs it, and turns errors into one clear message and an exit status.

Exit status: 0 done, 1 failed or interrupted, 2 wrong usage or input, 3 refused (would not fit, did not verify).
Results go to stdout, everything else to stderr. A verb is a file in this folder with a function `command`, whose
first docstring line is its summary; its heavy imports stand inside that function, so that `--help` is quick and torch
starts after OpenMP was set up.
"""

import errno
import sys
from ast import get_docstring, parse
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from veneer import machine
from veneer.cli.console import stderr
from veneer.errors import VeneerError, did_you_mean

NOT_VERBS = {"__init__", "main", "console"}
ADVICE = {
    errno.EACCES: "Change its permissions, or name another place.",
    errno.EPERM: "Change its permissions, or name another place.",
    errno.EROFS: "Name a place that can be written.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A part of this path is a file where a folder was expected; check the path.",
    errno.EISDIR: "It is a folder where a file was expected; check the path.",
    errno.ENOSPC: "The disk is full; free some space and run again.",
    errno.EDQUOT: "Your share of the disk is full; free some space and run again.",
}
"""What to do about an error of the operating system."""
FLAGS = {
    "allow_other_base=True": "--allow-other-base",
    "force=True": "--force",
    'format="raw"': "--raw",
    "storage=NAME": "--storage NAME",
    "data=FILE": "--data FILE",
    "database=FILE": "--database FILE",
    "dtype=torch.float32": "--dtype float32",
    "rank=N": "--rank N",
}
"""How the library names an argument -> the flag of the commands that have it."""


def verbs() -> dict[str, Path]:
    """Every verb and its file; a trailing underscore keeps a verb off a Python keyword or builtin."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {f.stem.removesuffix("_"): f for f in files if f.stem not in NOT_VERBS}


def usage() -> str:
    """The help of `veneer` alone: a line per verb, read from the files without importing them."""
    width = max(map(len, verbs()), default=0)
    lines = [f"  {v:<{width}}  {_summary(f)}" for v, f in verbs().items()]
    head = "Usage: veneer COMMAND [OPTIONS]\n\nAdapt pretrained models on the machine you have.\n\nCommands:\n"
    return head + "\n".join(lines) + "\n\n`veneer COMMAND --help` shows its options and an example."


def _summary(file: Path) -> str:
    return (get_docstring(parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def invoke(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(import_module("importlib.metadata").version("veneer"))
        return 0
    name, *rest = arguments
    if name not in verbs():
        complain(f"there is no command {name!r}{did_you_mean(name, verbs())} There are: {', '.join(verbs())}.")
        return 2
    try:
        module = import_module(f"veneer.cli.{verbs()[name].stem}")
        verb = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        verb.command(name, **getattr(module, "SETTINGS", {}))(_reporting(module.command))
        verb(rest, prog_name=f"veneer {name}")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt:  # before the verb's own work began
        complain("interrupted. Nothing was done yet.")
        return 1
    return 0


def _reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command`, with our errors and Ctrl-C turned into a message and an exit status."""

    @wraps(command)
    def run_and_report(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VeneerError as error:
            complain(as_flags(str(error)))
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt as interrupt:
            complain(f"interrupted. {str(interrupt) or 'Files written so far are whole.'}")
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has gone: typer ends quietly
                raise
            complain(_of_the_system(error))
            raise typer.Exit(1) from None

    return run_and_report


def as_flags(message: str) -> str:
    """A message of the library, which names arguments as Python has them, with the command line's flags instead."""
    for python, flag in FLAGS.items():
        message = message.replace(python, flag)
    return message


def _of_the_system(error: OSError) -> str:
    """What the operating system refused, where, and what to do."""
    where = f"{error.filename}: " if error.filename is not None else ""
    advice = ADVICE.get(error.errno or 0, "")
    return f"{where}{error.strerror or str(error) or type(error).__name__}. {advice}".rstrip()


def complain(message: str) -> None:
    """One message to stderr, as it is: no markup, no wrapping."""
    stderr.print(f"veneer: {message}", style="bold", markup=False, soft_wrap=True)


def run() -> None:
    """Entry point of the console script: set OpenMP up for this process, then run the verb."""
    machine.prepare_process()
    sys.exit(invoke(sys.argv[1:]))
