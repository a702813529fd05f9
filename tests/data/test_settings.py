import pytest
from pydantic import ValidationError

from veneer.data.settings import DataSettings, template_fields


def test_fields_of_a_template() -> None:
    assert template_fields("{question}\n{Table Name} {{literal}} {question}") == ["question", "Table Name", "question"]
    assert template_fields("no fields") == []


@pytest.mark.parametrize("template", ["{question", "a } b", "{}", "{x:>10}", "{x!r}"])
def test_malformed_templates_say_how_to_write_a_brace(template: str) -> None:
    with pytest.raises(ValueError, match=r"\{\{ \}\}"):
        template_fields(template)
    with pytest.raises(ValidationError, match=r"data\.prompt: template"):
        DataSettings(train="x.jsonl", prompt=template, completion="{y}")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": "{a}"}, "prompt and completion go together"),
        ({"completion": "{a}"}, "prompt and completion go together"),
        ({"prompt": "{a}", "completion": "{b}", "text": "{c}"}, "exclude each other"),
        ({"system": "Be brief.", "format": "plain"}, "system has no place in format: plain"),
        ({"system": "Be brief.", "text": "{a}"}, "system has no place before text"),
        ({"separator": " -> "}, "separator is for format: plain"),
        ({"eval_rows": 5}, "eval_rows needs eval"),
        ({"rows": 0}, "greater than or equal to 1"),
        ({"promt": "{a}"}, "Extra inputs are not permitted"),
        ({"format": "chatml"}, "'chat' or 'plain'"),
        ({"too_long": "cut"}, "'truncate' or 'drop'"),
    ],
)
def test_settings_that_would_be_ignored_or_unknown_are_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DataSettings(train="x.jsonl", **given)  # type: ignore[arg-type]


def test_several_contradictions_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        DataSettings(train="x.jsonl", prompt="{a}", eval_rows=3)
    assert "go together" in str(caught.value)
    assert "eval_rows needs eval" in str(caught.value)


def test_settings_written_out_whole_are_read_back_equal() -> None:
    settings = DataSettings(train="x.jsonl", prompt="{a}", completion="{b}")
    assert DataSettings(**settings.model_dump()) == settings


def test_every_field_has_help() -> None:
    assert [name for name, field in DataSettings.model_fields.items() if not field.description] == []
