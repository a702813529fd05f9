"""Read a recipe's YAML strictly: the line of each key, no key twice, 2e-4 as a number."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from veneer.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML with 2e-4 as a number, as everybody means it."""


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back: a text like 2e-4 gets quotes, Unicode's own line breaks are escaped."""


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, '"' if re.search("[\x85\u2028\u2029]", text) else None
    )


Dumper.add_representer(str, _text)

for _class in (Loader, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?((\d+\.\d*|\.\d+|\d+)[eE][-+]?\d+|\d+\.\d*|\.\d+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
        list("-+0123456789."),
    )


YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What PyYAML raises: its own, and for a date like 2024-13-45 or a tag that does not fit whatever its parts do."""


def read_value(text: str) -> Any:
    """One value.  Raises ConfigError."""
    try:
        return yaml.load(text, Loader)
    except YAML_ERRORS as error:
        raise ConfigError(f"{text!r} is not valid YAML: {_problem(error)}") from None


def read_tree(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A mapping, and dotted key -> line.  Raises ConfigError with file and line; `path` only words it."""
    try:
        node = yaml.compose(text, Loader)
        lines = dict(_lines(node, "", path, [], set())) if node else {}
        tree = yaml.load(text, Loader)
    except ConfigError:
        raise
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_problem(error)}") from None
    if not isinstance(tree, dict):
        found = {type(None): "empty", list: "a list"}.get(type(tree), "a single value")
        raise ConfigError(f"{path}: a recipe is a YAML mapping (model: ..., data: ..., run: ...), but this is {found}")
    return tree, lines


def write_tree(tree: dict[str, Any]) -> str:
    """The mapping as YAML that `read_tree` reads back as it was."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _problem(error: BaseException) -> str:
    return str(getattr(error, "problem", None) or error or type(error).__name__)


def _lines(
    node: yaml.Node, prefix: str, path: Path, within: list[yaml.Node], done: set[yaml.Node]
) -> Iterator[tuple[str, int]]:
    """Dotted key -> line, each node once however often it is referred to.

    Raises ConfigError for a key given twice, which YAML would pass over, and for a node that contains itself.
    """
    line = node.start_mark.line + 1
    if node in within:
        raise ConfigError(f"{path}, line {line}: {prefix.rstrip('.')} contains itself")
    if node in done:
        return
    within = [*within, node]
    done.add(node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _lines(item, prefix, path, within, done)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith((":str", ":merge")):
            raise ConfigError(
                f"{path}, line {line}: {key.value} is no name; if it is meant as one, put quotes around it"
            )
        if key.value in seen:
            raise ConfigError(
                f"{path}, line {line}: {prefix}{key.value} is given twice (first in line {seen[key.value]})"
            )
        seen[key.value] = line
        yield f"{prefix}{key.value}", line
        yield from _lines(value, f"{prefix}{key.value}.", path, within, done)
