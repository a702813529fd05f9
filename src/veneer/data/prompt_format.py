"""How an adapter's rows were put to the model: as turns of a chat or as plain text, with which templates."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from pydantic import ValidationError

from veneer.data.settings import DataSettings
from veneer.errors import ConfigError, did_you_mean

FORMATS = ("chat", "plain", "raw")
MAX_LENGTH = 1024
"""Tokens of a row, where no recipe says otherwise."""


@dataclass(frozen=True)
class PlainText:
    """Plain text: what stands around a prompt that is put without a chat template."""

    template: str | None = None
    """A recipe's data.prompt. With one column, the prompt fills it; with several, the prompt is the whole text."""
    separator: str = "\n"
    """What stands between the prompt and its answer."""

    def text(self, prompt: str) -> str:
        """Everything in front of the answer."""
        return _filled(self.template, prompt) + self.separator


RAW = PlainText(separator="")
"""The prompt and nothing else."""


def form_of(facts: Mapping[str, Any], asked: str | None = None) -> PlainText | None:
    """How prompts are put to a base, with an adapter whose folder says these facts; None for turns of a chat.

    asked   chat, plain or raw; by default as the adapter's rows were put, else chat
    Raises ConfigError for an unknown word.
    """
    if asked is not None and asked not in FORMATS:
        raise ConfigError(f"format is {asked!r}, should be one of {', '.join(FORMATS)}")
    if asked == "raw":
        return RAW
    trained = trained_on(facts)
    if asked == "plain":
        return trained or PlainText()
    return trained if asked is None else None


def trained_on(facts: Mapping[str, Any]) -> PlainText | None:
    """What an adapter folder's facts say of its rows; None for chats, and where they say nothing."""
    data, seen = _mapping(_mapping(facts, "recipe"), "data"), _mapping(facts, "data")
    if not data:
        return None
    layouts = seen.get("layouts")
    if data.get("text") is not None or (isinstance(layouts, dict) and set(layouts) == {"text"}):
        return RAW
    if data.get("format") != "plain":
        return None
    template, separator = data.get("prompt"), data.get("separator", PlainText.separator)
    return PlainText(template if isinstance(template, str) else None, str(separator))


def recorded_source(facts: Mapping[str, Any]) -> str | None:
    """The held-out rows that an adapter folder names, else its training rows; None if it names neither.

    Raises ConfigError for a name that is none.
    """
    data = _mapping(_mapping(facts, "recipe"), "data")
    source = data.get("eval") or data.get("train")
    if source is not None and not isinstance(source, str):
        raise ConfigError(f"data.train is {source!r}, the name of a file or data set is needed")
    return source


def recorded_settings(facts: Mapping[str, Any], source: str, **given: Any) -> tuple[DataSettings, int]:
    """How rows of `source` are read, as the adapter's were, and the most tokens of a row.

    given   settings that outrank the recorded ones; None means not given
    Raises ConfigError for settings that do not go together.
    """
    recipe = _mapping(facts, "recipe")
    of_data = {key: v for key, v in _mapping(recipe, "data").items() if key not in ("eval", "rows", "eval_rows")}
    values = of_data | {key: value for key, value in given.items() if value is not None} | {"train": source}
    length = _mapping(recipe, "train").get("max_length", MAX_LENGTH)
    try:
        return DataSettings.model_validate(values), length if isinstance(length, int) else MAX_LENGTH
    except ValidationError as error:
        raise ConfigError("; ".join(map(_problem, error.errors()))) from None


def _problem(error: Any) -> str:
    """One of pydantic's findings in a recipe's words."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"there is no key data.{key}{did_you_mean(key, DataSettings.model_fields)}"
    if isinstance(refusal := error.get("ctx", {}).get("error"), ConfigError):
        return str(refusal)
    return f"data.{key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _mapping(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key of somebody's JSON; empty if there is none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _filled(template: str | None, prompt: str) -> str:
    if template is None:
        return prompt
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    if len({name for _, name in parts if name is not None}) != 1:
        return prompt
    return "".join(literal + (prompt if name is not None else "") for literal, name in parts)
