"""Write a page for each method and each kind of virtual tokens: its equation, its settings, what was measured.

The text is the docstring of the method's file, the settings are its dataclass, the figures are docs/measured.json.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pages import table

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "docs" / "measured.json"
GENERATED = "<!-- Written by docs/generate.py from the code and docs/measured.json; run `make docs`. -->\n"


def pages() -> dict[str, str]:
    """File name -> text, of docs/methods."""
    from veneer.cli.list_ import methods, prompts
    from veneer.methods import METHODS
    from veneer.methods.init import INITS
    from veneer.prompts import PROMPTS

    written = {i["name"]: page("method", i, METHODS[i["name"]]) for i in methods()}
    written |= {i["name"]: page("method.init", i, INITS[i["name"]]) for i in inits_with_a_paper()}
    written |= {i["name"]: page("prompt", i, PROMPTS[i["name"]]) for i in prompts()}
    return {f"{name}.md": text for name, text in written.items()}


def inits_with_a_paper() -> list[dict[str, Any]]:
    """The starts of LoRA that are methods of their own in the literature."""
    from veneer.cli.list_ import inits

    return [item for item in inits() if item["source"]]


def page(section: str, item: dict[str, Any], thing: type) -> str:
    """One page; `section` is the recipe's key that names the thing."""
    name = item["name"]
    doc = inspect.getdoc(sys.modules[thing.__module__]) or ""
    title, _, text = doc.partition("\n\n")
    head, _, summary = " ".join(title.split()).partition(": ")
    parts = [f"# {head}\n", GENERATED, f"{summary[:1].upper()}{summary[1:]}\n", linked(text) + "\n"]
    parts.append("## In a recipe\n\n" + recipes(section, name))
    if "layers" in item:
        merges = "cannot" if section == "method" and not can_fold(thing) else "can"
        parts.append(f"Layers: {', '.join(item['layers'])}. The result {merges} be merged into the base's weights.\n")
    rows = [
        (f"`{section}.{s['name']}`", words(s), f"`{json.dumps(s['default'])}`", s["help"]) for s in item["settings"]
    ]
    settings = table(("key", "one of", "default", "meaning"), rows) if rows else "It has no settings of its own.\n"
    parts.append(f"## Settings\n\n{settings}")
    parts.append(f"## Measured\n\n{measured(name)}")
    return "\n".join(parts)


def can_fold(method: type) -> bool:
    from veneer.methods.base import Delta

    assert issubclass(method, Delta)
    return method.fold is not Delta.fold


def words(setting: dict[str, Any]) -> str:
    """The values that a setting takes, where they are a few words."""
    return ", ".join(f"`{choice}`" for choice in setting.get("choices", ()))


def linked(text: str) -> str:
    """A docstring as Markdown: papers become links, letters that Markdown would read as markup are kept."""

    def prose(line: str) -> str:
        pieces = line.split("`")  # every second one is code, where nothing is markup
        pieces[::2] = [re.sub(r"([*_<\[\]])", r"\\\1", piece) for piece in pieces[::2]]
        return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "`".join(pieces))

    return "\n".join(line if line.startswith("    ") else prose(line) for line in text.splitlines())


def recipes(section: str, name: str) -> str:
    """How a recipe names it, and the examples that do."""
    from veneer.recipe.load import load_recipe

    def names_it(path: Path) -> bool:
        recipe = load_recipe(path)
        if section != "method.init":
            return bool(getattr(recipe, section).name == name)
        init = recipe.method.own.get("init")
        return name == (init["name"] if isinstance(init, dict) else init)

    found = [path for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml")) if names_it(path)]
    links = ", ".join(f"[{path.name}](../../examples/recipes/{path.name})" for path in found)
    short, long = f"{section}: {name}", f"{section}: {{name: {name}, ...}}"
    if section == "method.init":
        short, long = (f"method: {{name: lora, init: {init}}}" for init in (name, f"{{name: {name}, ...}}"))
    return f"`{short}`, or with settings `{long}`. Whole recipes: {links}.\n"


def measured(name: str) -> str:
    """The figures of every measurement that this method takes part in."""
    known = json.loads(MEASURED.read_text(encoding="utf-8"))["measurements"]
    ours = [m for m in known if any(name in figure["of"] for figure in m["figures"])]
    if not ours:
        return "No figure of this method is recorded yet.\n"
    return "\n".join(section_of(m, "###", "../") for m in ours)


def all_measured() -> str:
    """Every measurement, for docs/measurements.md."""
    known = json.loads(MEASURED.read_text(encoding="utf-8"))["measurements"]
    return "\n".join(section_of(m, "###", "") for m in known)


def section_of(measurement: dict[str, Any], heading: str, root: str) -> str:
    """One measurement: what, its table, the command and the commit. `root` leads from the page to docs/."""
    columns = measurement["columns"]
    rows = [(figure["side"], *shown(figure, len(columns))) for figure in measurement["figures"]]
    recorded = f"{measurement['machine']}; recorded in commit {measurement['commit']}, {measurement['date']}"
    return (
        f"{heading} {measurement['title']}\n\n{measurement['setting']}\n\n"
        f"{table(('', *columns), rows)}\n"
        f"{recorded}; [details]({root}{measurement['page']}).\n\n"
        f"```text\n{measurement['command']}\n```\n"
    )


def shown(figure: dict[str, Any], columns: int) -> Iterable[str]:
    """The cells of a figure: its texts, or mean and range of the seeds at the rate that the result file has."""
    if "values" in figure:
        assert len(figure["values"]) == columns, figure
        return figure["values"]
    source, digits = figure["from"], figure["digits"]
    number: Callable[[float], str] = lambda value: f"{value:.{digits}f}"  # noqa: E731
    spread = f"{number(figure['mean'])} ({number(figure['least'])} to {number(figure['most'])})"
    return (f"{source['lr']:g}", spread)
