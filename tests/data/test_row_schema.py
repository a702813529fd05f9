from typing import Any

import pytest

from veneer.data.row_schema import Chat, Pair, Template, Text, recognize
from veneer.data.settings import DataSettings
from veneer.errors import DataError


def read(columns: dict[str, Any], complete: bool = True, **settings: Any) -> Any:
    return recognize(list(columns), DataSettings(train="x.jsonl", **settings)).read(columns, complete)


def roles(chat: Chat) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in chat.messages]


@pytest.mark.parametrize(
    ("columns", "content"),
    [
        ({"prompt": "p", "completion": "c"}, Pair("p", "c")),
        ({"question": "q", "answer": "a", "id": 3}, Pair("q", "a")),
        ({"question": "q", "answer": 42}, Pair("q", "42")),
        ({"instruction": "i", "input": "", "output": "o"}, Pair("i", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, Pair("i", "o")),
        ({"instruction": "i", "input": "x", "output": "o"}, Pair("i\n\nx", "o")),
        ({"instruction": "i", "context": "x", "response": "o"}, Pair("i\n\nx", "o")),
        ({"system_prompt": "s", "question": "q", "response": "r"}, Pair("q", "r", "s")),
        ({"text": "t", "url": "u"}, Text("t")),
    ],
)
def test_layouts_are_recognized(columns: dict[str, Any], content: object) -> None:
    assert read(columns) == content


def test_messages_and_sharegpt() -> None:
    messages = [{"role": "user", "content": "u", "name": "n"}, {"role": "assistant", "content": "a"}]
    assert read({"messages": messages}) == Chat(tuple(messages))
    talk = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    assert roles(read({"conversations": talk})) == [("system", "s"), ("user", "u"), ("assistant", "a")]
    assert roles(read({"conversations": messages})) == [("user", "u"), ("assistant", "a")]


def test_system_goes_before_chats_that_bring_none() -> None:
    bare, own = [{"role": "user", "content": "u"}], [{"role": "system", "content": "own"}]
    assert roles(read({"messages": bare, "db": "x"}, system="Use {db}."))[0] == ("system", "Use x.")
    assert roles(read({"messages": own + bare, "db": "x"}, system="Use {db}."))[0] == ("system", "own")
    assert roles(read({"messages": bare, "system": "column"}))[0] == ("system", "column")


def test_templates_win_over_recognition() -> None:
    columns = {"question": "q", "answer": "a", "schema": ["t(a)", "é"], "n": True}
    assert read(columns, prompt="{question}\n{schema} {{{n}}}", completion="answer") == Pair(
        'q\n["t(a)", "é"] {true}', "a"
    )
    assert read(columns, text="{question}: {answer}") == Text("q: a")


def test_a_prompt_alone_needs_no_completion() -> None:
    assert read({"mr": "x"}, complete=False, prompt="{mr}", completion="{text}") == Pair("x", None)
    with pytest.raises(DataError, match=r"data\.completion names the column 'text', which is not there"):
        read({"mr": "x"}, prompt="{mr}", completion="{text}")


def test_unknown_column_lists_those_seen() -> None:
    with pytest.raises(DataError) as caught:
        Template("{qestion}", ["question", "sql"], "data.prompt")
    assert str(caught.value) == (
        "data.prompt names the column 'qestion', which is not there. Did you mean 'question'? "
        "Columns seen: 'question', 'sql'."
    )


def test_a_single_word_is_a_column_and_a_sentence_is_constant() -> None:
    assert Template("a.b", ["a.b"], "x").fill({"a.b": "v"}) == "v"
    assert Template("Write a story.", ["a"], "x").fill({}) == "Write a story."
    assert Template("", ["a"], "x").fill({}) == ""
    with pytest.raises(DataError, match="'questoin', which is not there"):
        Template("questoin", ["question"], "x")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"text": "t", "label": "spam"}, "rows with the columns 'text', 'label' are of no known layout"),
        ({"a": 1}, 'Say in the recipe how to read them, e.g. data: {prompt: "{question}"'),
        ({"question": None, "answer": "a"}, "column 'question' is null"),
        ({"prompt": [{"role": "user"}], "completion": "c"}, "column 'prompt' holds list, wanted text"),
        ({"messages": "hi"}, "column 'messages' is no list of messages"),
        ({"messages": []}, "column 'messages' is no list of messages"),
        ({"messages": [{"content": "x"}]}, "message 1 has no 'role'; it has: 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, r"message 1 \(user\) has no text in 'content'"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, r"message 1 has weight 0\.5; known: 0"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1 is from 'alien'; known: system, human"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "message 1 is from"),
        ({"conversations": [{"from": "human"}]}, r"message 1 \(user\) has no text in 'value'"),
    ],
)
def test_rows_that_cannot_be_read_say_why(columns: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read(columns)


def test_used_columns_are_known() -> None:
    settings = DataSettings(train="x", system="{s}")
    assert recognize(["question", "answer", "s", "z"], settings).used == {"question", "answer", "s"}
    assert (
        recognize(["instruction", "input", "output"], DataSettings(train="x")).name == "instruction + input -> output"
    )
