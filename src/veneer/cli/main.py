"""The command `veneer`: finds the verb's file, runs it, and turns errors into one clear message and an exit status.

Exit status: 0 done, 1 failed or interrupted, 2 wrong usage or input, 3 refused (would not fit, did not verify).
Results go to stdout, everything else to stderr. A verb is a file in this folder with a function `command`; its
heavy imports stand inside that function, so that `--help` is quick and torch starts after OpenMP was set up.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import click
import typer
from typer.core import TyperGroup

from veneer import cli, machine
from veneer.cli.console import stderr
from veneer.errors import VeneerError, did_you_mean

NOT_VERBS = {"main", "console"}


class Verbs(TyperGroup):
    """One verb per file of this folder, imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [m.name.removesuffix("_") for m in iter_modules(cli.__path__) if m.name not in NOT_VERBS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name not in self.list_commands(ctx):
            known = self.list_commands(ctx)
            hint = did_you_mean(name, known)
            raise click.UsageError(f"there is no command {name!r}{hint} There are: {', '.join(known)}.")
        module = import_module(f"veneer.cli.{name}")
        verb = typer.Typer(add_completion=False, rich_markup_mode=None)
        verb.command(name, **getattr(module, "SETTINGS", {}))(module.command)
        return typer.main.get_command(verb)


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Adapt pretrained models on the machine you have: train a thin layer, prove it helped, merge it.",
)


@app.callback()
def root() -> None:
    """Keeps typer from running a lone verb without its name."""


def invoke(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit status; nothing but the verb's own output is printed on success."""
    try:
        result: Any = typer.main.get_command(app)(arguments, prog_name="veneer", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        where = f" See `{error.ctx.command_path} --help`." if isinstance(error, click.UsageError) and error.ctx else ""
        complain(f"{error.format_message()}{where}")
        return 2
    except VeneerError as error:
        complain(str(error))
        return error.exit_status
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted. Files written so far are whole.")
        return 1


def complain(message: str) -> None:
    """One message to stderr, as it is: no markup, no wrapping."""
    stderr.print(f"veneer: {message}", style="bold", markup=False, soft_wrap=True)


def run() -> None:
    """Entry point of the console script: set OpenMP up for this process, then run the verb."""
    machine.prepare_process()
    sys.exit(invoke())
