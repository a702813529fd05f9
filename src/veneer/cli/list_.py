"""List methods, inits, prompts, storages, tasks, metrics, models, schedules and optimizers."""

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import partial
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from veneer.cli.console import AsJson, emit_json, say
from veneer.errors import ConfigError, did_you_mean

Item = dict[str, Any]
"""`name`, `summary`, and where it has settings `settings`; methods and inits also have `layers` and `source`."""


def command(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="methods, metrics, ...; all if absent.")] = None,
    as_json: AsJson = False,
) -> None:
    """List methods, inits, prompts, storages, tasks, metrics, models, schedules and optimizers.

    With a KIND, the settings that each of them has are listed too. Example: veneer list methods
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"there is no kind {kind!r}{did_you_mean(kind, KINDS)} There are: {', '.join(KINDS)}.")
    found = {name: items() for name, items in KINDS.items() if kind in (None, name)}
    for name, items in found.items():
        if kind is None:
            say(name)
        for item in items:
            _print_item(item, items, whole=kind is not None)
        say("")
    if as_json:
        emit_json(found)


def _registered(module: str, registry: str, *, on_layers: bool = False, settings: bool = False) -> list[Item]:
    """All things of a registry: `on_layers` with the layers they fit and their paper."""
    things = getattr(import_module(module), registry)
    found = []
    for name in things:
        thing = things[name]
        item: Item = {"name": name, "summary": summary(things, name)}
        if on_layers:
            item |= {"layers": sorted(thing.kinds), "source": _source(thing)}
        found.append(item | ({"settings": settings_of(getattr(thing, "Config", thing))} if settings else {}))
    return found


methods = partial(_registered, "veneer.methods", "METHODS", on_layers=True, settings=True)
inits = partial(_registered, "veneer.methods.init", "INITS", on_layers=True, settings=True)
prompts = partial(_registered, "veneer.prompts", "PROMPTS", settings=True)
storages = partial(_registered, "veneer.storage", "STORAGES", settings=True)


def metrics() -> list[Item]:
    """What `veneer eval` measures."""
    own = [
        {"name": "loss", "summary": "Mean negative log likelihood of a supervised token, in nats."},
        {"name": "perplexity", "summary": "exp(loss)."},
    ]
    return sorted(own + _registered("veneer.evaluate.metrics", "METRICS"), key=lambda item: item["name"])


def models() -> list[Item]:
    """The models that need no hub."""
    from veneer.models.sources import ALIASES

    return [
        {"name": name, "summary": f"{w.megabytes} MB, fetched once as the package {w.package} {w.version}."}
        for name, w in ALIASES.items()
    ]


KINDS: dict[str, Callable[[], list[Item]]] = {
    "methods": methods,
    "inits": inits,
    "prompts": prompts,
    "storages": storages,
    "tasks": partial(_registered, "veneer.tasks", "TASKS"),
    "metrics": metrics,
    "models": models,
    "schedules": partial(_registered, "veneer.train.schedule", "SCHEDULES"),
    "optimizers": partial(_registered, "veneer.train.optim", "OPTIMIZERS"),
}


def summary(registry: Any, name: str) -> str:
    """What the file that registers a thing says first; where a file registers several, what the thing itself says."""
    thing = registry[name]
    alone = sum(registry[other].__module__ == thing.__module__ for other in registry) == 1
    doc = inspect.getdoc(sys.modules[thing.__module__] if alone else thing) or ""
    said = doc.partition("\n")[0].removeprefix(f"{name}: ")
    return said[:1].upper() + said[1:]


def settings_of(config: type) -> list[Item]:
    """Every field of a settings dataclass: `name`, `default`, `help`, and `choices` where it is one of a few words."""
    helps, types = _help_lines(config), get_type_hints(config)
    return [
        {"name": f.name, "default": _default(f), "help": helps.get(f.name, "")}
        | _choices(config, f.name, types[f.name])
        for f in fields(config)
        if f.name != "targets"  # of every method, and a key of the recipe itself
    ]


def _help_lines(config: type) -> dict[str, str]:
    """The text below each field, in the class and in those it is made from."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, below in zip(body.body, body.body[1:], strict=False):
            said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(said, str):
                found[line.target.id] = " ".join(said.split())
    return found


def _choices(config: Any, name: str, kind: Any) -> dict[str, list[Any]]:
    """The values of a Literal, or of a Literal or None; the names of the inits that a method can start from."""
    if name == "init":
        return {"choices": config.inits()}
    literals = [k for k in (kind, *get_args(kind)) if get_origin(k) is Literal]
    return {"choices": list(get_args(literals[0]))} if literals else {}


def _default(field: "Field[Any]") -> Any:
    """The default; None stands for none as well, since a recipe cannot tell the two apart."""
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _source(method: type) -> str | None:
    """The paper that the method's file names first."""
    said = re.search(r"Source: .*?(arXiv:\d+\.\d+)", inspect.getdoc(sys.modules[method.__module__]) or "", re.S)
    return said[1] if said else None


def _print_item(item: Item, items: list[Item], *, whole: bool) -> None:
    width = max(len(i["name"]) for i in items)
    say(f"{'' if whole else '  '}{item['name']:<{width}}  {item['summary']}")
    if whole and "layers" in item:
        source = f"; {item['source']}" if item["source"] else ""
        say(f"    on layers of kind {', '.join(item['layers'])}{source}")
    for setting in item.get("settings", ()) if whole else ():
        words = f" ({' | '.join(map(str, setting['choices']))})" if "choices" in setting else ""
        say(f"    {setting['name']}: {json.dumps(setting['default'])}{words}  {setting['help']}")
