"""A recipe from a YAML file and command-line flags: strict, with close matches, and written back whole.

Every key is a flag of the same dotted name: `--train.steps 50`, `--optimizer.lr=1e-3`; flags outrank the file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from veneer.errors import ConfigError, did_you_mean
from veneer.recipe.aliases import (
    AUTO,
    OTHER_MEANING,
    SAME_MEANING,
    SHORTHANDS,
    SWITCHES,
    canonical,
    inits,
    own_name,
    put,
    switch,
)
from veneer.recipe.settings import Recipe
from veneer.recipe.validation import boolean_problems, fields, keys, setting_problems, takes, type_problems
from veneer.recipe.yaml_io import read_tree, read_value, write_tree

__all__ = ["keys", "load_recipe", "parse_flags", "recipe_from", "respelled", "write_recipe"]


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None, *, prefix: str = "--") -> Recipe:
    """Read, complete and check a recipe.

    overrides    dotted key -> value, as `parse_flags` returns them; they outrank the file
    prefix       in front of an override's key in messages: "--" where they are flags, "" for arguments
    Raises ConfigError that names file, line and key (or flag) of everything that is wrong.
    """
    path = Path(path)
    tree, lines = read_tree(path, _read(path))
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    recipe = _checked(tree, overrides or {}, str(path), places, prefix)
    _refuse_elsewhere(recipe, path.parent)
    return recipe


def recipe_from(
    tree: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, where: str = "recipe"
) -> Recipe:
    """A checked recipe from nested mappings and dotted overrides (`where` only words the errors)."""
    return _checked(tree, overrides or {}, where, {}, "")


def respelled(text: str) -> str:
    """A stored recipe as `write_recipe` writes it today; unchanged if it is no recipe any more."""
    try:
        return write_recipe(recipe_from(read_tree(Path("recipe.yaml"), text)[0]))
    except ConfigError:
        return text


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`--train.steps 50 --data.packing=false` -> {"train.steps": 50, "data.packing": False}.

    Where a key takes text, the value is that text; elsewhere it is read as YAML.  Raises ConfigError listing all
    flags that are none.
    """
    overrides: dict[str, Any] = {}
    problems = []
    known = [*keys(), *SHORTHANDS, "memory", *SAME_MEANING, *SWITCHES, *OTHER_MEANING]
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        key, given, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            problems.append(f"{flag!r} is no flag; recipe keys are given like --train.steps 50")
        elif key not in known and not key.startswith(("method.", "prompt.", "storage.")):
            problems.append(f"there is no key --{key}{did_you_mean(key, known)} `veneer train --help` lists all keys.")
            rest = rest[1:] if not given and rest and not rest[0].startswith("--") else rest
        elif not given and (not rest or rest[0].startswith("--")):
            problems.append(f"--{key} needs a value, like --{key} VALUE")
        else:
            try:
                overrides[key] = _value(key, value if given else rest.pop(0))
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return overrides


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key under its own name with its value in force."""
    return write_tree(recipe.tree())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(
            f"there is no recipe {path}{did_you_mean(path.name, near)} It was looked for in {path.absolute().parent}; "
            "a recipe is a YAML file that names model, data and run."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the recipe {path} cannot be read: {error.strerror}; give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}; save it as UTF-8 text") from error


def _refuse_elsewhere(recipe: Recipe, beside: Path) -> None:
    """Paths count from the current folder: raise ConfigError for rows that are not there, but beside the recipe."""
    named = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    elsewhere = [
        f"{key}: there is no {name} in {Path.cwd()}, but there is {beside / name}"
        for key, name in named.items()
        if name is not None and not Path(name).expanduser().exists() and (beside / name).is_file()
    ]
    if elsewhere:
        here = "Paths in a recipe count from the folder that the command runs in: run it there, or write them so."
        raise ConfigError("\n".join([*elsewhere, here]))


def _value(key: str, text: str) -> Any:
    """A flag's value: text where the key takes text (a list where it takes that as well), otherwise YAML."""
    field = dict(fields(Recipe)).get(own_name(key))
    try:
        value = read_value(text)
    except ConfigError as error:
        if takes(field, str):
            return text
        raise ConfigError(f"--{key}: {error}") from None
    if not takes(field, str) or (isinstance(value, list) and takes(field, tuple[str, ...])):
        return value
    return None if value is None and text and takes(field, type(None)) else text


def _checked(
    tree: Mapping[Any, Any], overrides: Mapping[str, Any], where: str, places: dict[str, str], prefix: str
) -> Recipe:
    """The recipe, or ConfigError with a line for every problem: its place, the key, what was given, what to do."""
    settings, problems = canonical(tree)
    places |= {own_name(key): place for key, place in places.items() if own_name(key) not in places}
    for key in [key for key in SWITCHES if key in overrides]:
        problems += switch(settings, key, overrides)
        places |= {key: f"{prefix}{key}", "storage": f"{prefix}{key}"}
    for key, value in overrides.items():
        if key in SWITCHES:
            continue
        dotted = f"{key}.name" if key in SHORTHANDS and isinstance(value, str) else own_name(key, value)
        if (key, value) == ("memory", "auto"):
            dotted, value = AUTO
        if key in OTHER_MEANING:
            problems.append((key, f"{key}: {OTHER_MEANING[key]}"))
        else:
            put(settings, dotted, value, outrank=True)
        places[dotted] = f"{prefix}{key}"
    problems += [*inits(settings), *boolean_problems(settings)]
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        problems += type_problems(error, {*places, *keys()})
    problems += setting_problems(settings)
    if problems:
        known = dict.fromkeys(f"{_place(key, places) or where}: {message}" for key, message in problems)
        raise ConfigError("\n".join(known))
    return recipe


def _place(key: str, places: Mapping[str, str]) -> str | None:
    """Where a key was given, else the nearest section around it."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key)
