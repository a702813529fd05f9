"""A prompt is put as the adapter's rows were, unless something else is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from veneer.data.prompt_format import RAW, PlainText, form_of, recorded_settings, recorded_source, trained_on
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.data.sources import Row
from veneer.disk.adapter_dir import read_facts
from veneer.errors import ConfigError
from veneer.generate.streaming import encode


def recorded(**data: Any) -> dict[str, Any]:
    return {"recipe": {"data": DataSettings(train="rows.jsonl", **data).model_dump(mode="json")}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter folder that says it was trained on plain text."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    facts = recorded(prompt="{q}", completion="{a}", format="plain", separator=" -> ")
    (tmp_path / "veneer.json").write_text(json.dumps(facts), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "columns", "typed"),
    [
        ("{q}", {"q": "who?"}, "who?"),
        ("q", {"q": "who?"}, "who?"),
        ("Q: {q}\nA {{short}} answer to {q}:", {"q": "who?"}, "who?"),
        ("{schema}\n{q}", {"schema": "a, b", "q": "who?"}, "a, b\nwho?"),
    ],
)
@pytest.mark.parametrize("separator", ["\n", " => "])
def test_the_tokens_are_those_that_were_trained(
    tiny_model: Path, prompt: str, columns: dict[str, str], typed: str, separator: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    settings = DataSettings(train="x", prompt=prompt, completion="{a}", format="plain", separator=separator)
    trained = Renderer(tokenizer, settings, 512).prompt(Row(columns | {"a": "me"}, "rows", 1))
    form = trained_on({"recipe": {"data": settings.model_dump(mode="json")}})
    assert encode(tokenizer, [{"role": "user", "content": typed}], plain=form) == trained


def test_what_is_recorded() -> None:
    assert trained_on(recorded(prompt="{q}", completion="{a}")) is None, "turns of a chat"
    assert trained_on(recorded(format="plain")) == PlainText()
    assert trained_on(recorded(text="{body}")) == RAW
    recognized = recorded() | {"data": {"layouts": {"text": 12}}}
    assert trained_on(recognized) == RAW, "rows of text alone, without a word in the recipe"
    assert trained_on(recognized | {"data": {"layouts": {"text": 12, "prompt -> completion": 1}}}) is None
    for nothing in ({}, {"recipe": None}, {"recipe": {"data": "x"}}):
        assert trained_on(nothing) is None


def test_what_is_asked_for_outranks_it(folder: Path) -> None:
    facts = read_facts(folder)
    assert form_of(facts) == form_of(facts, "plain") == PlainText("{q}", " -> ")
    assert form_of(facts, "chat") is None and form_of(facts, "raw") == RAW
    assert form_of({}) is None and form_of({}, "plain") == PlainText()
    with pytest.raises(ConfigError, match="format is 'alpaca', should be one of chat, plain, raw"):
        form_of(facts, "alpaca")


def test_rows_are_read_as_they_were_for_training(folder: Path) -> None:
    facts = read_facts(folder) | {"recipe": {**read_facts(folder)["recipe"], "train": {"max_length": 77}}}
    settings, most = recorded_settings(facts, "other.jsonl", format=None, separator=" => ")
    assert (settings.train, settings.prompt, settings.format, settings.separator) == (
        "other.jsonl",
        "{q}",
        "plain",
        " => ",
    )
    assert most == 77 and recorded_settings({}, "x.jsonl")[1] == 1024
    assert recorded_source(facts) == "rows.jsonl" and recorded_source({"recipe": []}) is None
    with pytest.raises(ConfigError, match="prompt and completion go together"):
        recorded_settings({}, "x.jsonl", prompt="{q}")
