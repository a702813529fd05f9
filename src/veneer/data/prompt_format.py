"""How a prompt is put to a model: as turns of a chat, or as plain text, which is what some adapters were trained on."""

from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from veneer.disk.adapter_dir import read_facts
from veneer.errors import ConfigError

FORMATS = ("chat", "plain")


@dataclass(frozen=True)
class Plain:
    """Plain text: what stands around a prompt that is put without a chat template."""

    template: str | None = None
    """A recipe's data.prompt. With one column, the prompt fills it; with several, the prompt is the whole text."""
    separator: str = "\n"
    """What stands between the prompt and its answer."""

    def text(self, prompt: str) -> str:
        """Everything in front of the answer."""
        return _filled(self.template, prompt) + self.separator


RAW = Plain(separator="")
"""The prompt and nothing else."""


def form_for(adapter: Path | None, asked: str | None = None, *, raw: bool = False) -> Plain | None:
    """How prompts are put to a base with this adapter folder, or without one; None for turns of a chat.

    asked   chat or plain; by default as the adapter's rows were put, where its folder says so, and else chat
    raw     as they are
    Raises ConfigError for an unknown word, and for both at once.
    """
    if asked is not None and asked not in FORMATS:
        raise ConfigError(f"--format is {asked!r}, should be one of {', '.join(FORMATS)}")
    if raw and asked is not None:
        raise ConfigError(f"--raw and --format {asked} exclude each other: a raw prompt is put as it is")
    if raw:
        return RAW
    trained = trained_on(read_facts(adapter)) if adapter is not None else None
    if asked == "plain":
        return trained or Plain()
    return trained if asked is None else None


def trained_on(facts: dict[str, Any]) -> Plain | None:
    """What an adapter folder's facts say of its rows; None for chats, and where they say nothing."""
    recipe = facts.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(data, dict):
        return None
    seen = facts.get("data")
    layouts = seen.get("layouts") if isinstance(seen, dict) else None
    if data.get("text") is not None or (isinstance(layouts, dict) and set(layouts) == {"text"}):
        return RAW
    if data.get("format") != "plain":
        return None
    template, separator = data.get("prompt"), data.get("separator", Plain.separator)
    return Plain(template if isinstance(template, str) else None, str(separator))


def _filled(template: str | None, prompt: str) -> str:
    if template is None:
        return prompt
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    if len({name for _, name in parts if name is not None}) != 1:
        return prompt
    return "".join(literal + (prompt if name is not None else "") for literal, name in parts)
