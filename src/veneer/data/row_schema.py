"""What a row is: a chat, a prompt with its completion, or running text.

Templates in the settings win; otherwise the columns are recognized, or refused with what was seen. Values that are
no text enter a template as JSON.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from veneer.data.settings import DataSettings, template_fields
from veneer.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Chat:
    """Messages as a chat template takes them: `role`, `content` and whatever else the row brought."""

    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Pair:
    """A prompt and what shall be written after it; `completion` is None where only a prompt was asked for."""

    prompt: str
    completion: str | None
    system: str | None = None


@dataclass(frozen=True)
class Text:
    """Running text."""

    text: str


Content = Chat | Pair | Text


@dataclass(frozen=True)
class Layout:
    """How rows with certain columns are read."""

    name: str
    """For people: `messages`, `question -> answer`, ..."""
    used: frozenset[str]
    """The columns it reads."""
    read: Callable[[Mapping[str, Any], bool], Content]
    """(columns, whether the completion is wanted) -> content; raises DataError without the place."""


PAIRS = (  # prompt, completion, optional middle part of the prompt
    ("prompt", "completion", None),
    ("question", "answer", None),
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("prompt", "response", None),
    ("question", "response", None),
    ("query", "response", None),
    ("input", "output", None),
)
SYSTEM = ("system", "system_prompt")
ANSWERS = frozenset(  # beside `text` they are what it is about, so text alone is not the whole row
    ("answer", "category", "class", "completion", "intent", "label", "labels", "output", "response", "sql", "summary")
)
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"
)


def recognize(columns: list[str], settings: DataSettings) -> Layout:
    """The layout of rows with these columns.  Raises DataError: which columns were seen, what to write."""
    if settings.prompt is not None and settings.completion is not None:
        return _templated(settings.prompt, settings.completion, columns, settings)
    if settings.text is not None:
        running = Template(settings.text, columns, "data.text")
        return Layout("text", running.columns, lambda row, _: Text(running.fill(row)))
    if "messages" in columns:
        return _chat("messages", "role", "content", columns, settings)
    if "conversations" in columns:
        return _chat("conversations", "from", "value", columns, settings)
    for prompt, completion, middle in PAIRS:
        if prompt in columns and completion in columns:
            return _pair(prompt, completion, middle, columns, settings)
    if "text" in columns and not ANSWERS & set(columns):
        return Layout("text", frozenset({"text"}), lambda row, _: Text(_string(row, "text")))
    raise DataError(
        f"rows with the columns {', '.join(map(repr, columns)) or '(none)'} are of no known layout (messages, "
        "conversations, prompt/completion, question/answer, instruction/output, text alone). "
        'Say in the recipe how to read them, e.g. data: {prompt: "{question}", completion: "{answer}"} '
        'or data: {text: "{text}"}.'
    )


class Template:
    """Text with columns in braces; a single word is a column's name.

    Raises DataError for a column that rows do not have, with those they have.
    """

    def __init__(self, template: str, columns: list[str], setting: str, constant: bool = False) -> None:
        parts = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
        if not constant and template and not template_fields(template) and not any(c.isspace() for c in template):
            parts = [("", template)]
        self.columns = frozenset(name for _, name in parts if name is not None)
        self._parts = parts
        for name in sorted(self.columns - set(columns)):
            raise DataError(
                f"{setting} names the column {name!r}, which is not there{did_you_mean(name, columns)} "
                f"Columns seen: {', '.join(map(repr, columns)) or '(none)'}."
            )

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text with a row's values; raises DataError for a null."""
        return "".join(literal if name is None else literal + _string(row, name) for literal, name in self._parts)


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        raise DataError(f"column {name!r} is null")
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return str(value)  # dates and decimals of Parquet


def _templated(prompt: str, completion: str, columns: list[str], settings: DataSettings) -> Layout:
    before, system = Template(prompt, columns, "data.prompt"), _system(columns, settings, own=False)
    missing, after = None, None
    try:
        after = Template(completion, columns, "data.completion")
    except DataError as error:  # counts only where a completion is wanted: prompts alone can be generated from
        missing = error

    def read(row: Mapping[str, Any], complete: bool) -> Pair:
        if complete and missing:
            raise missing
        written = after.fill(row) if complete and after else None
        return Pair(before.fill(row), written, system.fill(row) if system else None)

    used = [template.columns for template in (before, after, system) if template]
    return Layout("prompt and completion templates", frozenset().union(*used), read)


def _pair(prompt: str, completion: str, middle: str | None, columns: list[str], settings: DataSettings) -> Layout:
    system = _system(columns, settings)

    def read(row: Mapping[str, Any], complete: bool) -> Pair:
        parts = [_plain_text(row, prompt)]
        if middle in columns and row[middle] not in (None, ""):
            parts.append(_plain_text(row, str(middle)))
        after = _plain_text(row, completion) if complete else None
        return Pair("\n\n".join(parts), after, system.fill(row) if system else None)

    used = [prompt, completion, *([middle] if middle in columns and middle else [])]
    name = f"{prompt}{' + ' + middle if len(used) > 2 and middle else ''} -> {completion}"
    return Layout(name, frozenset(used) | (system.columns if system else frozenset()), read)


def _plain_text(row: Mapping[str, Any], name: str) -> str:
    if isinstance(row[name], list | dict):
        raise DataError(f"column {name!r} holds {type(row[name]).__name__}, wanted text; chats go into `messages`")
    return _string(row, name)


def _system(columns: list[str], settings: DataSettings, own: bool = True) -> Template | None:
    """The system message of each row: the setting, else (for recognized rows) a column of that name."""
    if settings.system is not None:
        return Template(settings.system, columns, "data.system", constant=True)
    if own and settings.format == "chat":
        for name in SYSTEM:
            if name in columns:
                return Template(f"{{{name}}}", columns, "data.system")
    return None


def _chat(column: str, role: str, text: str, columns: list[str], settings: DataSettings) -> Layout:
    system = _system(columns, settings)

    def read(row: Mapping[str, Any], _: bool) -> Chat:
        messages = _messages(row[column], column, role, text)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system.fill(row)}, *messages]
        return Chat(tuple(messages))

    return Layout(column, frozenset({column}) | (system.columns if system else frozenset()), read)


def _messages(value: Any, column: str, role: str, text: str) -> list[dict[str, Any]]:
    """Checked messages with `role` and `content`; sharegpt's names are translated."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"column {column!r} is no list of messages [{{{role!r}: ..., {text!r}: ...}}, ...]")
    messages = []
    for number, message in enumerate(value, start=1):
        if column == "conversations" and role in message:
            if str(message[role]) not in SHAREGPT_ROLES:
                known = ", ".join(SHAREGPT_ROLES)
                raise DataError(f"message {number} is from {message[role]!r}; known: {known}. Others: use `messages`")
            message = {"role": SHAREGPT_ROLES[str(message[role])], "content": message.get(text)}
        if not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no {role!r}; it has: {', '.join(map(repr, message)) or '(nothing)'}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f"message {number} ({message['role']}) has no text in {text!r}")
        if message.get("weight", 1) not in (0, 1, None):
            raise DataError(f"message {number} has weight {message['weight']!r}; known: 0 (not trained), 1 (trained)")
        messages.append(message)
    return messages
