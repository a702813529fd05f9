"""Results go to stdout, remarks to stderr, both as they are; JSON is one line."""

import json

import pytest

from veneer.cli.console import emit_json, remark, stderr, stdout


def test_json_is_one_line_and_keeps_every_letter(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "München\n:x: [bold]", "rows": 3}
    emit_json(value)
    captured = capsys.readouterr()
    assert captured.out == '{"text": "München\\n:x: [bold]", "rows": 3}\n' and captured.err == ""
    assert json.loads(captured.out) == value


def test_two_streams_and_no_pictures_for_words(capsys: pytest.CaptureFixture[str]) -> None:
    stdout.print("a :smile: result 12", markup=False)
    stderr.print("a :x: remark", markup=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a :smile: result 12\n", "a :x: remark\n")


def test_a_remark_is_one_line_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    line = "reading rows.jsonl [all] :x: " + "word " * 40
    remark(line)
    assert capsys.readouterr() == ("", line + "\n")
