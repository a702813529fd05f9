"""A recipe from a YAML file and command-line flags: strict, with close matches, and written back whole.

Every key is a flag of the same dotted name: `--train.steps 50`, `--optimizer.lr=1e-3`; flags outrank the file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as repr_of
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from veneer.errors import ConfigError, did_you_mean
from veneer.train.aliases import OTHER_MEANING, SAME_MEANING, SHORTHANDS, Problem, canonical, own_name, put
from veneer.train.settings import MethodSettings, Recipe


class _Loader(yaml.SafeLoader):
    """YAML with 2e-4 as a number, as everybody means it."""


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads back: a text like 2e-4 gets quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?((\d+\.\d*|\.\d+|\d+)[eE][-+]?\d+|\d+\.\d*|\.\d+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
        list("-+0123456789."),
    )


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, complete and check a recipe.

    overrides    dotted key -> value, as `parse_flags` returns them; they outrank the file
    Raises ConfigError that names file, line and key (or flag) of everything that is wrong.
    """
    path = Path(path)
    tree, lines = _parse(path, _read(path))
    return _checked(tree, overrides or {}, str(path), {key: f"{path}, line {line}" for key, line in lines.items()})


def recipe_from(tree: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """A checked recipe from nested mappings (`where` only words the errors)."""
    return _checked(tree, {}, where, {})


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`--train.steps 50 --data.packing=false` -> {"train.steps": 50, "data.packing": False}.

    Where a key takes text, the value is that text; elsewhere it is read as YAML.  Raises ConfigError listing all
    flags that are none.
    """
    overrides: dict[str, Any] = {}
    problems = []
    known = [*keys(), *SHORTHANDS, *SAME_MEANING, *OTHER_MEANING]
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        key, given, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            problems.append(f"{flag!r} is no flag; recipe keys are given like --train.steps 50")
        elif not given and (not rest or rest[0].startswith("--")):
            problems.append(f"--{key} needs a value, like --{key} VALUE")
        elif key not in known and not key.startswith("method."):
            problems.append(f"there is no key --{key}{did_you_mean(key, known)} `veneer train --help` lists all keys.")
            rest = rest if given else rest[1:]
        else:
            try:
                overrides[key] = _value(key, value if given else rest.pop(0))
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return overrides


def keys() -> dict[str, str]:
    """Every dotted key of a recipe with its one-line help; `method` has further ones of its own."""
    return {key: " ".join((field.description or "").split()) for key, field in _fields(Recipe)}


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key under its own name with its value in force."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and definition of everything that is no section."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _takes(field: FieldInfo | None, kind: Any) -> bool:
    return field is not None and (field.annotation is kind or kind in get_args(field.annotation))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no recipe {path}{did_you_mean(path.name, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from error


def _parse(path: Path, text: str) -> tuple[dict[Any, Any], dict[str, int]]:
    try:
        node = yaml.compose(text, _Loader)
        lines = dict(_lines(node, "", path, [])) if node else {}
        tree = yaml.load(text, _Loader)
    except ConfigError:
        raise
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}{_mark(error)}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a recipe is a YAML mapping (model: ..., data: ...), but this is {type(tree).__name__}"
        )
    return tree, lines


YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What PyYAML raises: its own, and for a date like 2024-13-45 or a tag that does not fit whatever its parts do."""


def _mark(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _lines(node: yaml.Node, prefix: str, path: Path, within: list[yaml.Node]) -> Iterator[tuple[str, int]]:
    """Dotted key -> line; raises ConfigError for a key given twice, which YAML would pass over, and for a loop."""
    line = node.start_mark.line + 1
    if node in within:
        raise ConfigError(f"{path}, line {line}: {prefix.rstrip('.')} contains itself")
    within = [*within, node]
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _lines(item, prefix, path, within)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith((":str", ":merge")):
            raise ConfigError(f"{path}, line {line}: {key.value} is no name; put quotes around it if it is meant as one")
        if key.value in seen:
            raise ConfigError(
                f"{path}, line {line}: {prefix}{key.value} is given twice (first in line {seen[key.value]})"
            )
        seen[key.value] = line
        yield f"{prefix}{key.value}", line
        yield from _lines(value, f"{prefix}{key.value}.", path, within)


def _value(key: str, text: str) -> Any:
    """A flag's value: text where the key takes text (a list where it takes that as well), otherwise YAML."""
    field = dict(_fields(Recipe)).get(own_name(key))
    try:
        value = yaml.load(text, _Loader)
    except YAML_ERRORS as error:
        if _takes(field, str):
            return text
        raise ConfigError(f"--{key} {text!r} is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not _takes(field, str) or (isinstance(value, list) and _takes(field, tuple[str, ...])):
        return value
    return None if value is None and text and _takes(field, type(None)) else text


def _checked(tree: Mapping[Any, Any], overrides: Mapping[str, Any], where: str, places: dict[str, str]) -> Recipe:
    """The recipe, or ConfigError with a line for every problem: its place, the key, what was given, what to do."""
    settings, problems = canonical(tree)
    places |= {own_name(key): place for key, place in places.items() if own_name(key) not in places}
    for key, value in overrides.items():
        dotted = f"{key}.name" if key in SHORTHANDS and isinstance(value, str) else own_name(key, value)
        if key in OTHER_MEANING:
            problems.append((key, f"{key}: {OTHER_MEANING[key]}"))
        elif put(settings, dotted, value, outrank=True) is None:
            places[dotted] = f"--{key}"
    problems += _truths(settings)
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        problems += _explained(error, {*places, *keys()})
    problems += _of_method(settings)
    if problems:
        known = dict.fromkeys(f"{_place(key, places) or where}: {message}" for key, message in problems)
        raise ConfigError("\n".join(known))
    return recipe


def _place(key: str, places: Mapping[str, str]) -> str | None:
    """Where a key stands, or else the nearest section around it."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key)


def _truths(settings: Mapping[Any, Any]) -> list[Problem]:
    """true and false where a number belongs, which would be read as 1 and 0."""
    problems = []
    for key, field in _fields(Recipe):
        section, _, leaf = key.rpartition(".")
        inside = settings.get(section) if section else settings
        value = inside.get(leaf) if isinstance(inside, Mapping) else None
        if isinstance(value, bool) and not _takes(field, bool) and not _takes(field, str):
            problems.append((key, f"{key} is {value}, where a number belongs. {keys()[key]}"))
    return problems


def _of_method(settings: Mapping[Any, Any]) -> list[Problem]:
    """What the method says of its own settings."""
    from veneer.methods.base import config_from  # not at import: brings torch

    try:
        method = MethodSettings.model_validate(settings.get("method", {}))
        config_from(method.name, method.own)
    except ValidationError:
        return []  # said already
    except ConfigError as error:
        problems = []
        for message in str(error).split("\n"):
            named = re.search(r"has no setting '([^']+)'|^\w+[.:] ?(\w+)", message)
            problems.append((f"method.{(named[1] or named[2]) if named else 'name'}", message))
        return problems
    return []


def _explained(error: ValidationError, known: set[str]) -> list[Problem]:
    """Pydantic's findings in a recipe's words."""
    problems = []
    for problem in error.errors():
        key = _key(problem["loc"], known)
        if problem["type"] == "extra_forbidden":
            section = key.rpartition(".")[0]
            near = [k for k in [*keys(), *SAME_MEANING] if not section or k.startswith(f"{section}.")]
            message = f"there is no key {key}{did_you_mean(key, near)}"
        elif problem["type"] == "missing":
            message = f"{key} is missing: {keys().get(key, 'it has no default')}"
        elif isinstance((problem.get("ctx") or {}).get("error"), ConfigError):
            message = str(problem["ctx"]["error"])
        else:
            message = _wrong_value(key, problem["input"], problem["msg"])
        problems.append((key, message))
    return problems


def _wrong_value(key: str, given: Any, wanted: str) -> str:
    said = wanted.removeprefix("Value error, ")
    quotes = " Put quotes around a text that begins with a brace." if isinstance(given, dict) else ""
    return f"{key} is {repr_of(given)}: {said[0].lower()}{said[1:]}. {keys().get(key, '')}{quotes}".rstrip()


def _key(location: Sequence[int | str], known: set[str]) -> str:
    """The dotted key of a pydantic location, without the parts that name a branch of a union or an index."""
    parts = [str(part) for part in location if isinstance(part, str)]
    dotted = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((key for key in dotted if key in known), dotted[0] if dotted else "")
