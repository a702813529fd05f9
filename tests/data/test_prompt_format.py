"""A prompt is put as the adapter's rows were, unless something else is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from veneer.data.prompt_format import RAW, Plain, form_for, trained_on
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.data.sources import Row
from veneer.errors import AdapterMismatch, ConfigError
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
    assert trained_on(recorded(format="plain")) == Plain()
    assert trained_on(recorded(text="{body}")) == RAW
    recognized = recorded() | {"data": {"layouts": {"text": 12}}}
    assert trained_on(recognized) == RAW, "rows of text alone, without a word in the recipe"
    assert trained_on(recognized | {"data": {"layouts": {"text": 12, "prompt -> completion": 1}}}) is None
    for nothing in ({}, {"recipe": None}, {"recipe": {"data": "x"}}):
        assert trained_on(nothing) is None


def test_what_is_asked_for_outranks_it(folder: Path) -> None:
    assert form_for(folder) == form_for(folder, "plain") == Plain("{q}", " -> ")
    assert form_for(folder, "chat") is None and form_for(folder, raw=True) == RAW
    assert form_for(None) is None and form_for(None, "plain") == Plain()
    (folder / "veneer.json").unlink()
    assert form_for(folder) is None
    with pytest.raises(ConfigError, match="--format is 'alpaca', should be one of chat, plain"):
        form_for(folder, "alpaca")
    with pytest.raises(ConfigError, match="--raw and --format plain exclude each other"):
        form_for(folder, "plain", raw=True)
    with pytest.raises(AdapterMismatch, match="there is no adapter folder"):
        form_for(folder / "absent")
