"""Write what the docs say a second time: docs/recipe.md, docs/cli.md and the README's table of methods.

    python docs/generate.py          (or `make docs`)

The text comes from the code: help lines under settings, each verb's --help, the registry of methods. A test fails where
a page is not what this writes.
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin
from unittest import mock

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[1]
RECIPE, CLI, README = ROOT / "docs" / "recipe.md", ROOT / "docs" / "cli.md", ROOT / "README.md"
BEGIN, END = "<!-- methods: written by docs/generate.py -->\n", "<!-- end of methods -->\n"
GENERATED = "<!-- Written by docs/generate.py from the code; change it there and run `make docs`. -->\n"


def pages() -> dict[Path, str]:
    """Every generated file as it should be."""
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {RECIPE: recipe_page(), CLI: cli_page(), README: before + BEGIN + methods_table() + END + after}


def recipe_page() -> str:
    """Every key of a recipe, with other programs' names for it."""
    from veneer.cli.list_ import inits, methods, prompts, storages
    from veneer.recipe.aliases import LORA_INITS, OTHER_MEANING, SAME_MEANING
    from veneer.recipe.settings import Recipe

    own = {"method": methods, "prompt": prompts, "storage": storages}
    parts = [
        "# Recipe keys\n",
        GENERATED,
        "A recipe is a YAML file. A key that is not below is refused, with the nearest one that is. Every key is also\n"
        "a flag of the same dotted name, which outranks the file: `veneer train recipe.yaml --train.steps 50`.\n"
        "`storage`, `method`, `prompt` and `optimizer` may be given by name alone: `method: lora`.\n"
        "Paths in it count from the folder that the command runs in, wherever the recipe is.\n",
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


def methods_table() -> str:
    """The README's table: what is in the registry, and what it can do."""
    from veneer.cli.list_ import inits, methods
    from veneer.methods import METHODS
    from veneer.methods.base import Delta

    rows = []
    for item in methods():
        method = METHODS[item["name"]]
        merges = "yes" if method.fold is not Delta.fold else "no"
        rows.append((f"`{item['name']}`", *_described(item, merges)))
        if item["name"] == "lora":
            rows += [(f"`lora` with `init: {i['name']}`", *_described(i, merges)) for i in inits() if i["source"]]
    head = ("method", "what it learns", "layers", "merges", "paper")
    return f"{table(head, rows)}\n{also_there()}\n"


def _described(item: dict[str, Any], merges: str) -> tuple[str, ...]:
    source = f"[{item['source']}](https://arxiv.org/abs/{item['source'][6:]})" if item["source"] else ""
    return item["summary"].rstrip("."), ", ".join(item["layers"]), merges, source


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


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
