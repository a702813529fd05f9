"""Write the pages and tables that say what the code says: `make docs`, or `python docs/generate.py`.

The text comes from the code: help lines under settings, each verb's --help, docstrings, registries. A test fails where
a page is not what this writes.
"""

import ast
import inspect
import json
import os
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import house
import method_pages
import notebooks
from pages import between_marks, table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
GENERATED = "<!-- Written by docs/generate.py from the code; change it there and run `make docs`. -->\n"


def pages() -> dict[Path, str]:
    """Every generated file as it should be."""
    measurements = DOCS / "measurements.md"
    return {
        DOCS / "recipe.md": recipe_page(),
        DOCS / "cli.md": cli_page(),
        DOCS / "api.md": api_page(),
        DOCS / "house.svg": house.drawing(),
        DOCS / "methods.md": methods_page(),
        measurements: between_marks(measurements, "figures", method_pages.all_measured()),
        README: between_marks(README, "methods", methods_table("docs/")),
        **{DOCS / "methods" / name: text for name, text in method_pages.pages().items()},
    }


def recipe_page() -> str:
    """Every key of a recipe, with other programs' names for it."""
    from veneer.cli.list_ import inits, methods, prompts, storages
    from veneer.recipe.aliases import LORA_INITS, OTHER_MEANING, SAME_MEANING
    from veneer.recipe.settings import Recipe

    own = {"method": methods, "prompt": prompts, "storage": storages}
    parts = [
        "# Recipe keys\n",
        GENERATED,
        "A recipe is a YAML file. An unknown key is refused, with the nearest known one. Every key is also a flag of\n"
        "the same dotted name, which outranks the file: `veneer train recipe.yaml --train.steps 50`.\n"
        "`storage`, `method`, `prompt` and `optimizer` may be given by name alone: `method: lora`.\n"
        "Relative paths start at the folder in which the command runs, not at the recipe's.\n",
    ]
    for name, section, text in sections(Recipe):
        parts.append(f"## {name}\n\n{text}\n" if name else "## At the top\n")
        prefix = f"{name}." if name else ""
        rows = [
            (f"`{prefix}{key}`", kind(f.annotation), default(f), " ".join((f.description or "").split()))
            for key, f in section.model_fields.items()
            if not is_section(f)
        ]
        parts.append(table(("key", "takes", "default", "meaning"), rows))
        if name in own:
            parts += [own_settings(name, item) for item in own[name]()]
        if name == "method":
            parts += [own_settings("method.init", item) for item in inits()]
    parts.append("## Names from elsewhere\n\nThese are accepted, and written back under the name on the right.\n")
    old = [(f"`method: {name}`", f"`method: lora` with `method.init: {name}`") for name in LORA_INITS]
    parts.append(table(("given", "is"), [*((f"`{k}`", f"`{v}`") for k, v in SAME_MEANING.items()), *old]))
    parts.append("These mean something else here, so they are refused:\n")
    parts.append(table(("given", "what to do"), [(f"`{k}`", v) for k, v in OTHER_MEANING.items()]))
    return "\n".join(parts)


def sections(recipe: type[BaseModel]) -> Iterable[tuple[str, type[BaseModel], str]]:
    """The recipe itself (named ""), then its sections: name, settings, what they are."""
    yield "", recipe, ""
    for name, field in recipe.model_fields.items():
        if is_section(field):
            assert isinstance(field.annotation, type)
            yield name, field.annotation, (field.annotation.__doc__ or "").partition("\n")[0]


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def own_settings(section: str, item: dict[str, Any]) -> str:
    """The settings of a method, an init, a prompt or a storage."""
    layers = f" Layers: {', '.join(item['layers'])}." if "layers" in item else ""
    head = f"### {section}: {item['name']}\n\n{item['summary']}{layers}\n"
    if not item["settings"]:
        return f"{head}\nIt has no settings of its own.\n"
    rows = [
        (
            f"`{section}.{s['name']}`",
            ", ".join(f"`{c}`" for c in s.get("choices", ())),
            f"`{json.dumps(s['default'])}`",
            s["help"],
        )
        for s in item["settings"]
    ]
    return f"{head}\n{table(('key', 'one of', 'default', 'meaning'), rows)}"


def kind(annotation: Any) -> str:
    """What may stand there, in a reader's words."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if annotation in (names := {bool: "true, false", int: "whole number", float: "number", str: "text"}):
        return names[annotation]
    if get_origin(annotation) is tuple:
        return "list"
    parts = [kind(part) for part in get_args(annotation) if part is not NoneType and not isinstance(part, FieldInfo)]
    return " or ".join(dict.fromkeys(parts))


def default(field: FieldInfo) -> str:
    """The default as it is written in YAML."""
    if field.is_required():
        return "(needed)"
    value = field.get_default(call_default_factory=True)
    return "(absent)" if value is None else f"`{json.dumps(value)}`"


def cli_page() -> str:
    """`veneer --help` and that of every verb."""
    from veneer.cli.main import usage, verbs

    parts = ["# Commands\n", GENERATED, f"```text\n{usage()}\n```\n"]
    parts.append(
        "Exit status: 0 done, 1 failed or interrupted, 2 wrong usage or input, 3 refused (would not fit, did not\n"
        "verify). Results go to stdout, everything else to stderr; with `--json` the last line of stdout is one\n"
        "JSON object.\n"
    )
    parts += [f"## veneer {verb}\n\n```text\n{help_of(verb)}\n```\n" for verb in verbs()]
    return "\n".join(parts)


def help_of(verb: str) -> str:
    """What `veneer VERB --help` prints on a terminal of 80 columns."""
    from veneer.cli.main import invoke

    with redirect_stdout(StringIO()) as printed, mock.patch.dict(os.environ, {"COLUMNS": "80"}):
        status = invoke([verb, "--help"])
    assert status == 0, f"veneer {verb} --help ended with {status}"
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def methods_table(root: str) -> str:
    """What is in the registry, and what it can do. `root` leads from the page to docs/."""
    from veneer.cli.list_ import methods
    from veneer.methods import METHODS

    rows = []
    for item in methods():
        merges = "yes" if method_pages.can_fold(METHODS[item["name"]]) else "no"
        rows.append((f"[`{item['name']}`]({root}methods/{item['name']}.md)", *described(item, merges)))
        if item["name"] == "lora":
            inits = method_pages.inits_with_a_paper()
            rows += [
                (f"`lora`, [`init: {i['name']}`]({root}methods/{i['name']}.md)", *described(i, merges)) for i in inits
            ]
    head = ("method", "what it learns", "layers", "merges", "paper")
    return f"{table(head, rows)}\n{also_there()}\n"


def described(item: dict[str, Any], merges: str) -> tuple[str, ...]:
    source = f"[{item['source']}](https://arxiv.org/abs/{item['source'][6:]})" if item["source"] else ""
    return item["summary"].rstrip("."), ", ".join(item["layers"]), merges, source


def methods_page() -> str:
    """The methods and the kinds of virtual tokens, each with its page."""
    from veneer.cli.list_ import prompts

    rows = [(f"[`{item['name']}`](methods/{item['name']}.md)", item["summary"]) for item in prompts()]
    return "\n".join(
        [
            "# Methods\n",
            GENERATED,
            "`method:` in a recipe names one of these. Its page has its equation, settings and figures.\n",
            methods_table(""),
            "## Virtual tokens\n\n`prompt:` in a recipe names one of these, alone or beside a method.\n",
            table(("prompt", "what it learns"), rows),
        ]
    )


def api_page() -> str:
    """The public names, room by room from the top floor down; mkdocstrings puts their docstrings there."""
    rank = {room: (floor, room) for floor, rooms in enumerate(house.order()) for room in rooms}
    homes = homes_of_public_names()
    of_room: dict[str, list[str]] = {}
    for name, home in sorted(homes.items()):
        of_room.setdefault(home.split(".")[1], []).append(name)
    rooms = sorted(of_room, key=rank.__getitem__, reverse=True)
    rows = [
        (f"[`{n}`](#veneer{n.lower()})", f"`{room}`", summary_of(homes[n])) for room in rooms for n in of_room[room]
    ]
    parts = [
        "# Python\n",
        GENERATED,
        "Every public name, the top floor of the house first. `import veneer` loads nothing; a name is loaded when it\n"
        "is first used. `train` and `evaluate` are rooms that can be called.\n"
        "Signatures and docstrings are put in below the table when the site is built (`make docs`).\n",
        table(("name", "room", "what it is"), rows),
    ]
    for room in rooms:
        parts.append(f"## {room}\n")
        for name in of_room[room]:
            path = homes[name] if name in rank else f"veneer.{name}"  # a room's own name means the room to mkdocstrings
            parts.append(f"### veneer.{name}\n\n::: {path}\n")
    return "\n".join(parts)


def homes_of_public_names() -> dict[str, str]:
    """Public name -> the path of what it stands for, as the package imports it for type checkers."""
    import veneer

    homes = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(Path(veneer.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("veneer.")
        for alias in node.names
    }
    named = {name: home for name, home in homes.items() if name in veneer.__all__}
    verbs = [name for name in veneer.__all__ if inspect.ismodule(getattr(veneer, name))]
    return named | {name: f"veneer.{name}.Verb.__call__" for name in verbs}


def summary_of(home: str) -> str:
    """The first line about a public name; of a registry the one of its room."""
    module, _, name = home.removesuffix(".Verb.__call__").rpartition(".")
    thing = getattr(import_module(module), name)
    if inspect.ismodule(thing):
        described: Any = type(thing).__call__
    else:
        described = thing if hasattr(thing, "__qualname__") else import_module(module)
    return (inspect.getdoc(described) or "").partition("\n")[0]


def also_there() -> str:
    """What a recipe or `veneer eval` can name besides a method."""
    from veneer.cli.list_ import KINDS
    from veneer.recipe.settings import OptimizerSettings, StorageSettings, TrainSettings

    keys = {
        "storages": StorageSettings.model_fields["name"],
        "optimizers": OptimizerSettings.model_fields["name"],
        "schedules": TrainSettings.model_fields["schedule"],
    }
    lines = []
    for name in ("storages", "optimizers", "schedules", "metrics"):
        registered = [item["name"] for item in KINDS[name]()]
        taken = get_args(keys[name].annotation) if name in keys else ()
        known = [n for n in registered if n in taken] if taken else registered
        lines.append(f"{name}: {', '.join(f'`{n}`' for n in known)}")
    return "Besides: " + "; ".join(lines) + "."


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    for path in notebooks.write(ROOT / "build" / "notebooks"):
        print(f"wrote {path.relative_to(ROOT)}")
