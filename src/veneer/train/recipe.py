"""A recipe from a YAML file and command-line flags: strict, with close matches, and written back whole.

Every key is a flag of the same dotted name: `--train.steps 50`, `--optimizer.lr=1e-3`; flags outrank the file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from veneer.errors import ConfigError, did_you_mean
from veneer.train.aliases import OTHER_MEANING, SAME_MEANING, canonical
from veneer.train.settings import MethodSettings, Recipe

SHORTHANDS = ("storage", "method", "optimizer")
"""Sections that may be given as a bare name: `method: lora`."""


class _Loader(yaml.SafeLoader):
    """YAML with 2e-4 as a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, complete and check a recipe.

    overrides    dotted key -> value, as `parse_flags` returns them
    Raises ConfigError that names file, line and key of everything that is wrong.
    """
    path = Path(path)
    text = _read(path)
    tree, lines = _parse(path, text)
    for key, value in (overrides or {}).items():
        _set(tree, SAME_MEANING.get(key, key), value)
    return recipe_from(tree, where=str(path), lines=lines)


def recipe_from(tree: Mapping[str, Any], *, where: str = "recipe", lines: Mapping[str, int] | None = None) -> Recipe:
    """A checked recipe from nested mappings (`where` and `lines` only word the errors)."""
    lines = lines or {}
    try:
        settings, _ = canonical(dict(tree))
        for section in SHORTHANDS:
            if isinstance(settings.get(section), str):
                settings[section] = {"name": settings[section]}
        recipe = Recipe.model_validate(settings)
        _check_method(recipe.method)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, lines)) from None
    except ConfigError as error:
        key = str(error).partition(":")[0].split(" ")[0]
        at = f", line {lines[key]}" if key in lines else ""
        raise ConfigError(f"{where}{at}: {error}") from None
    return recipe


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`--train.steps 50 --data.packing=false` -> {"train.steps": 50, "data.packing": False}, values read as YAML."""
    overrides: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} is no flag; recipe keys are given like --train.steps 50")
        key, given, value = flag.removeprefix("--").partition("=")
        if not given and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"--{key} needs a value, like --{key} VALUE")
        known = [*keys(), *SAME_MEANING, *OTHER_MEANING]
        if key not in known and not key.startswith("method."):
            raise ConfigError(
                f"there is no key --{key}{did_you_mean(key, known)} `veneer train --help` lists all keys."
            )
        overrides[key] = yaml.load(value if given else rest.pop(0), _Loader)
    return overrides


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a recipe with its one-line help; `method` has further ones of its own."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = " ".join((field.description or "").split())
    return found


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key under its own name with its value in force."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no recipe {path}{did_you_mean(path.name, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from error


def _parse(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        node = yaml.compose(text, _Loader)
        lines = dict(_lines(node, "", path)) if node else {}
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{at}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a recipe is a YAML mapping (model: ..., data: ...), but this is {type(tree).__name__}"
        )
    return tree, lines


def _lines(node: yaml.Node, prefix: str, path: Path) -> Iterator[tuple[str, int]]:
    """Dotted key -> line; raises ConfigError for a key given twice, which YAML would pass over."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ConfigError(
                f"{path}, line {line}: {prefix}{key.value} is given twice (first in line {seen[key.value]})"
            )
        seen[key.value] = line
        yield f"{prefix}{key.value}", line
        yield from _lines(value, f"{prefix}{key.value}.", path)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        if isinstance(tree.get(section), str):
            tree[section] = {"name": tree[section]}
        tree = tree.setdefault(section, {})
    tree[leaf] = value


def _check_method(method: MethodSettings) -> None:
    """The method's own settings, checked by the method itself."""
    from veneer.methods.base import config_from  # not at import: brings torch

    config_from(method.name, method.own)


def _explain(error: ValidationError, where: str, lines: Mapping[str, int]) -> str:
    """All problems, one line each: file, line, key, what was given, what to do."""
    known = keys()
    messages = []
    for problem in error.errors():
        key = _key(problem["loc"], {*known, *lines})
        at = f"{where}, line {lines[key]}" if key in lines else where
        if problem["type"] == "extra_forbidden":
            section = key.rpartition(".")[0]
            near = [k for k in [*known, *SAME_MEANING] if not section or k.startswith(f"{section}.")]
            messages.append(f"{at}: there is no key {key}{did_you_mean(key, near)}")
        elif problem["type"] == "missing":
            messages.append(f"{at}: {key} is missing: {known.get(key, 'it has no default')}")
        elif isinstance((problem.get("ctx") or {}).get("error"), ConfigError):
            messages.append(f"{at}: {problem['ctx']['error']}")
        else:
            wanted = problem["msg"].removeprefix("Value error, ")
            told = f"{at}: {key} is {problem['input']!r}: {wanted[0].lower()}{wanted[1:]}. {known.get(key, '')}"
            messages.append(told.rstrip())
    return "\n".join(dict.fromkeys(messages))


def _key(location: Sequence[int | str], known: set[str]) -> str:
    """The dotted key of a pydantic location, without the parts that name a branch of a union or an index."""
    parts = [str(part) for part in location if isinstance(part, str)]
    dotted = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((key for key in dotted if key in known), dotted[0] if dotted else "")
