"""A row's content as text, with the character spans that the model shall write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.data.row_schema import Chat, Content, Pair, Text
from veneer.data.settings import DataSettings
from veneer.errors import DataError, ModelError


@dataclass(frozen=True)
class Document:
    """Text and what of it is trained."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) that the model writes, rising."""
    closed: bool
    """Whether each span ends in the template's end-of-turn token; otherwise the end-of-text token is appended."""
    running: bool = False
    """Running text: it may be split anywhere."""


def document(content: Content, tokenizer: Any, settings: DataSettings) -> Document:
    """Raises DataError (without the place) for content with nothing to write."""
    if isinstance(content, Text):
        if not content.text.strip():
            raise DataError("the text is empty")
        return Document(content.text, ((0, len(content.text)),), closed=False, running=True)
    if isinstance(content, Pair):
        completion = content.completion or ""
        if not completion.strip():
            raise DataError("the completion is empty")
        if settings.format == "plain":
            prompt = content.prompt + settings.separator
            return Document(prompt + completion, ((len(prompt), len(prompt) + len(completion)),), closed=False)
        return _rendered([*question(content), {"role": "assistant", "content": completion}], tokenizer)
    if settings.format == "plain":
        raise DataError("a row of messages needs format: chat; for plain text give prompt and completion templates")
    return _rendered(list(content.messages), tokenizer)


def question(content: Pair) -> list[dict[str, Any]]:
    """The messages in front of a pair's completion."""
    system = [{"role": "system", "content": content.system}] if content.system else []
    return [*system, {"role": "user", "content": content.prompt}]


def prompt_text(content: Content, tokenizer: Any, settings: DataSettings) -> tuple[str, list[int]]:
    """Everything the model reads before it writes its (last) answer, generation prompt included.

    Also where in it earlier answers begin, as they do in the whole document.
    """
    if isinstance(content, Text):
        raise DataError("running text has no prompt; give prompt and completion templates")
    if settings.format == "plain":
        if isinstance(content, Chat):
            raise DataError("a row of messages needs format: chat")
        return content.prompt + settings.separator, []
    if isinstance(content, Pair):
        return render(tokenizer, question(content), ask=True), []
    messages = list(content.messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    messages = messages[: answers[-1]] if answers else messages
    earlier = [i for i, m in enumerate(messages) if i and _trained(m)]
    return render(tokenizer, messages, ask=True), [len(render(tokenizer, messages[:i], ask=True)) for i in earlier]


def completion_text(content: Content) -> str:
    """What the model should write last, as the row has it."""
    if isinstance(content, Chat):
        answers = [m["content"] for m in content.messages if m["role"] == "assistant" and m.get("content")]
        if not answers:
            raise DataError("no message of the assistant has text")
        return str(answers[-1])
    if isinstance(content, Text):
        raise DataError("running text has no completion")
    return content.completion or ""


def _rendered(messages: Sequence[dict[str, Any]], tokenizer: Any) -> Document:
    """Each assistant turn is what the template adds between asking for it and having it."""
    trained = [i for i, m in enumerate(messages) if _trained(m)]
    if not trained:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"no assistant message with text (and weight 1) to train on; roles: {roles}")
    if trained[0] == 0:
        raise DataError(
            "the row begins with an assistant message, so nothing asks for it; remove it, or give it weight: 0"
        )
    whole = render(tokenizer, messages[: trained[-1] + 1])
    spans = []
    for i in trained:
        before = render(tokenizer, messages[:i], ask=True)
        after = whole if i == trained[-1] else render(tokenizer, messages[: i + 1])
        if not after.startswith(before):
            raise DataError(
                f"the chat template writes message {i + 1} otherwise than it asks for it, so what is trained cannot be "
                f"told from its text: it asks with ...{before[-40:]!r} but goes on with "
                f"{_from_difference(before, after)!r}. Correct the template, or use format: plain"
            )
        if not whole.startswith(after):  # some templates end every rendering, not every turn, with eos
            after = after.removesuffix(tokenizer.eos_token or "")
        if not whole.startswith(after):
            raise DataError(
                f"the chat template rewrites message {i + 1} when later ones follow (near "
                f"{_from_difference(after, whole)!r}), so it cannot be trained there. Make one row of each answer with "
                "the messages before it, giving those weight: 0"
            )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return Document(whole[: spans[-1][1]], tuple(spans), closed=True)


def _trained(message: dict[str, Any]) -> bool:
    said = str(message.get("content") or "").strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(said) and message.get("weight") != 0


def _from_difference(expected: str, got: str, width: int = 40) -> str:
    at = next((k for k, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return got[max(0, at - 10) : at + width]


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], ask: bool = False) -> str:
    """The chat template's text; `ask` adds the generation prompt.

    Raises ModelError for a tokenizer without template, DataError where the template refuses the messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the model's tokenizer has no chat template; set data.format: plain")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error
