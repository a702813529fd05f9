"""Talk with a model, and switch between its adapters."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.console import AllowOtherBase, DeviceName, Dtype, Form, KeptIn, Model, remark

HELP = """\
/adapter NAME   answer with this adapter from now on; /adapter none without any; /adapter lists them
/system TEXT    set the system message and begin anew; /system alone removes it
/reset          forget the conversation
/help           this
/quit           leave (so do Ctrl-D and, at the prompt, Ctrl-C); Ctrl-C during an answer stops the answer"""


def command(
    model: Model,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DIR", help="Adapter folder; may be repeated. The first answers.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    format: Form = None,  # noqa: A002
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest text; above 0 draws by chance.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    dtype: Dtype = "auto",
    device: DeviceName = "auto",
    storage: KeptIn = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Talk with a model; /help shows what else can be typed. Example:

    veneer chat smollm2-135m-instruct --adapter sql=runs/sql/adapter --adapter math=runs/math/adapter
    """
    from veneer.adapters.attach import load_adapter
    from veneer.base.load import load_model
    from veneer.base.storage_config import storage_for
    from veneer.data.prompt_format import form_of
    from veneer.disk.adapter_dir import read_facts
    from veneer.generate.chat_session import NONE, ChatSession
    from veneer.generate.streaming import sampler_of

    sampler = sampler_of(temperature, top_p, top_k, seed)
    folders = _adapter_names(adapter or [])
    forms = {name: form for name, folder in folders.items() if (form := form_of(read_facts(folder), format))}
    kept = storage_for([*folders.values()], storage)
    base = load_model(model, storage=kept, device=device, dtype=dtype, say=remark)
    adapters = {
        name: load_adapter(base, folder, allow_other_base=allow_other_base).detach() for name, folder in folders.items()
    }
    talk = ChatSession(base, adapters, forms=forms, sampler=sampler, max_new_tokens=max_tokens)
    talk.system = system
    remark(f"{model}, {talk.switch(next(iter(adapters), NONE))}. /help for commands, Ctrl-D to leave.")
    while (line := _read()) is not None:
        if not _command(talk, line.strip()):
            break


def _command(talk: Any, line: str) -> bool:
    """Do what one line says; False to leave."""
    from veneer.errors import InputError

    word, _, rest = line.partition(" ")
    try:
        match word:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/help":
                remark(HELP)
            case "/reset" | "/system":
                if word == "/system":
                    talk.system = rest.strip() or None
                talk.reset()
                remark("The conversation begins anew.")
            case "/adapter":
                remark(talk.switch(rest.strip()) if rest.strip() else talk.listing())
            case _ if word.startswith("/"):
                remark(f"there is no command {word}\n{HELP}")
            case _:
                _answer(talk, line)
    except InputError as error:
        remark(str(error))
    return True


def _answer(talk: Any, line: str) -> None:
    try:
        talk.ask(line, lambda piece: print(piece, end="", flush=True))
    except KeyboardInterrupt:
        print(flush=True)
        remark("(stopped)")
    else:
        print(flush=True)


def _read() -> str | None:
    """One line; None at the end of input and at Ctrl-C."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and recalled
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print(flush=True)
        return None


def _adapter_names(given: list[str]) -> dict[str, Path]:
    """ "sql=runs/sql/adapter" or "runs/sql/adapter" -> name and folder.

    A folder without name is called after its last part, or after the run it lies in where that part is "adapter".
    Raises ConfigError for a name given twice, or the name "none".
    """
    from veneer.errors import ConfigError
    from veneer.generate.chat_session import NONE

    named: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        if not equals:
            whole = path.absolute()
            name = whole.parent.name if whole.name == "adapter" else whole.name
        if not name or name == NONE or name in named:
            why = "is given twice" if name in named else "cannot be used"
            raise ConfigError(f"the adapter name {name!r} {why}; name each folder, like --adapter sql={path}")
        named[name] = path
    return named
