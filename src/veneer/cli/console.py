"""What verbs share: results to stdout, progress and remarks to stderr, one JSON object last if asked; options."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console

stdout = Console(highlight=False, emoji=False)
stderr = Console(stderr=True, highlight=False, emoji=False)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="An alias, a hub id, a folder or a .gguf file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
DeviceName = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="auto (CUDA if there is any), cpu, cuda, cuda:N or mps."),
]
Form = Annotated[
    str | None, typer.Option(metavar="chat|plain", help="How prompts are put; by default as the adapter's rows were.")
]
KeptIn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Keep the model in nf4, ...; by default as the adapter's was.")
]
AllowOtherBase = Annotated[bool, typer.Option("--allow-other-base", help="Use a base the adapter was not trained on.")]


def say(text: str) -> None:
    """A line of the result on stdout, as it is."""
    stdout.print(text, markup=False, soft_wrap=True)


def remark(text: str) -> None:
    """A line on stderr about what takes a while or was not done."""
    stderr.print(text, style="dim", markup=False, soft_wrap=True)


def emit_json(result: dict[str, Any]) -> None:
    """One line of JSON on stdout; it is the last thing a verb prints."""
    print(json.dumps(result, ensure_ascii=False), flush=True)
