from collections.abc import Callable
from typing import Any

import pytest

from veneer.data.chat import Document, completion_text, document, prompt_text, render
from veneer.data.row_schema import Chat, Content, Pair, Text
from veneer.data.settings import DataSettings
from veneer.errors import DataError, ModelError

CHAT, PLAIN = DataSettings(train="x"), DataSettings(train="x", format="plain", separator=" => ")
U, A = "<|im_start|>user\n", "<|im_start|>assistant\n"


def talk(*turns: tuple[str, str], **last: Any) -> Chat:
    messages = [{"role": role, "content": text} for role, text in turns]
    return Chat((*messages[:-1], messages[-1] | last))


def trained(doc: Document) -> list[str]:
    return [doc.text[a:b] for a, b in doc.spans]


def test_a_pair_as_chat_and_plain(tokenizer: Any) -> None:
    doc = document(Pair("q", "a ", "s"), tokenizer, CHAT)
    assert doc.text == f"<|im_start|>system\ns<|im_end|>\n{U}q<|im_end|>\n{A}a <|im_end|>"
    assert trained(doc) == ["a <|im_end|>"]
    assert doc.closed
    doc = document(Pair("q", "a "), tokenizer, PLAIN)
    assert (doc.text, trained(doc), doc.closed) == ("q => a ", ["a "], False)


def test_every_assistant_turn_is_trained_and_what_follows_the_last_is_left_out(tokenizer: Any) -> None:
    chat = talk(("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"), ("user", "3"))
    doc = document(chat, tokenizer, CHAT)
    assert trained(doc) == ["one<|im_end|>", "two<|im_end|>"]
    assert doc.text.endswith("two<|im_end|>")


def test_weight_0_and_empty_turns_are_read_but_not_trained(tokenizer: Any) -> None:
    chat = Chat(
        (
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "one", "weight": 0},
            {"role": "assistant", "content": "  "},
            {"role": "assistant", "content": "two", "weight": 1},
        )
    )
    doc = document(chat, tokenizer, CHAT)
    assert trained(doc) == ["two<|im_end|>"]
    assert "one" in doc.text


@pytest.mark.parametrize(
    ("content", "settings", "told"),
    [
        (Pair("q", " \n"), CHAT, "the completion is empty"),
        (Text(" "), CHAT, "the text is empty"),
        (talk(("user", "q")), CHAT, r"no assistant message with text \(and weight 1\) to train on; roles: user"),
        (talk(("user", "q"), ("assistant", "a"), weight=0), CHAT, "no assistant message"),
        (talk(("user", "q"), ("assistant", "a")), PLAIN, "messages needs format: chat"),
    ],
)
def test_nothing_to_train_is_refused(tokenizer: Any, content: Content, settings: DataSettings, told: str) -> None:
    with pytest.raises(DataError, match=told):
        document(content, tokenizer, settings)


def test_a_default_system_message_belongs_to_the_prompt(with_template: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nS<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(template)
    doc = document(Pair(" q ", " a "), tokenizer, CHAT)
    assert doc.text == f"<|im_start|>system\nS<|im_end|>\n{U}q<|im_end|>\n{A}a<|im_end|>"  # it also trims
    assert trained(doc) == ["a<|im_end|>"]


def test_a_row_that_begins_with_the_assistant_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="begins with an assistant message, so nothing asks for it"):
        document(talk(("assistant", "hello"), ("user", "q"), ("assistant", "a")), tokenizer, CHAT)
    greeting = {"role": "assistant", "content": "hello", "weight": 0}
    chat = Chat((greeting, *talk(("user", "q"), ("assistant", "a")).messages))
    assert trained(document(chat, tokenizer, CHAT)) == ["a<|im_end|>"]


def test_a_template_that_asks_otherwise_than_it_writes_is_refused(with_template: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"message 2 otherwise than it asks for it.*<model>.*<assistant>a"):
        document(Pair("q", "a"), with_template(template), CHAT)


def test_a_template_that_rewrites_earlier_turns_is_refused(with_template: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    thinking = [("user", "1"), ("assistant", "<think>x</think>one"), ("user", "2"), ("assistant", "two")]
    with pytest.raises(DataError, match="rewrites message 2 when later ones follow"):
        document(talk(*thinking), with_template(template), CHAT)
    assert trained(document(talk(*thinking[:2]), with_template(template), CHAT)) == ["<think>x</think>one<|im_end|>"]


def test_a_template_without_generation_prompt_trains_the_header_too(with_template: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    assert trained(document(Pair("q", "a"), with_template(template), CHAT)) == ["assistant: a<|im_end|>"]


def test_no_template_and_a_template_that_refuses(with_template: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"no chat template; set data\.format: plain"):
        document(Pair("q", "a"), with_template(None), CHAT)
    assert document(Pair("q", "a"), with_template(None), PLAIN).text == "q => a"
    with pytest.raises(DataError, match="refuses the messages: roles must alternate"):
        render(with_template("{{ raise_exception('roles must alternate') }}"), [{"role": "user", "content": "x"}])


def test_a_template_that_ends_every_rendering_with_eos(with_template: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = with_template(template, eos_token="<|endoftext|>")
    doc = document(talk(("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two")), tokenizer, CHAT)
    assert trained(doc) == ["one<|im_end|>", "two<|im_end|>\n<|endoftext|>"]


def test_prompts_and_completions(tokenizer: Any) -> None:
    assert prompt_text(Pair("q", None), tokenizer, CHAT) == (f"{U}q<|im_end|>\n{A}", [])
    assert prompt_text(Pair("q", None), tokenizer, PLAIN) == ("q => ", [])
    chat = talk(("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"))
    text, earlier = prompt_text(chat, tokenizer, CHAT)
    assert text == f"{U}1<|im_end|>\n{A}one<|im_end|>\n{U}2<|im_end|>\n{A}"
    assert [text[at : at + 3] for at in earlier] == ["one"]
    assert prompt_text(talk(("user", "1")), tokenizer, CHAT) == (f"{U}1<|im_end|>\n{A}", [])
    assert (completion_text(chat), completion_text(Pair("q", "a"))) == ("two", "a")
    with pytest.raises(DataError, match="running text has no prompt"):
        prompt_text(Text("t"), tokenizer, CHAT)
    with pytest.raises(DataError, match="running text has no completion"):
        completion_text(Text("t"))
    with pytest.raises(DataError, match="no message of the assistant has text"):
        completion_text(talk(("user", "1")))
