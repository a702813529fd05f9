"""`veneer generate` writes what the model says, with the adapter that was named."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.greedy import said_after
from veneer.cli.main import invoke
from veneer.kernels import native

ASKED = "<|im_start|>user\nWhich city?<|im_end|>\n<|im_start|>assistant\n"


def run(tiny_model: Path, *more: str) -> int:
    return invoke(["generate", str(tiny_model), "--dtype", "float32", "--max-tokens", "12", *more])


def test_the_answer_is_the_models(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_model, "--prompt", "Which city?") == 0
    assert capsys.readouterr().out == said_after(tiny_model, ASKED, 12) + "\n"


def test_what_takes_a_while_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    if native.library() is None:
        pytest.skip("that is said as well")
    assert run(tiny_model, "--prompt", "Which city?", "--storage", "nf4") == 0
    said = capsys.readouterr()
    assert said.err == f"quantizing {tiny_model} to nf4 (block 64, double_quant True) (once)\n"
    assert run(tiny_model, "--prompt", "Which city?", "--storage", "nf4") == 0
    assert capsys.readouterr() == (said.out, "")
    missed = native.Status(False, None, None, "no C++ compiler found; install one")
    monkeypatch.setattr(native, "load", lambda: missed)
    assert run(tiny_model, "--prompt", "Which city?", "--storage", "nf4", "--json") == 0
    assert capsys.readouterr().err == f"plain torch computes with 4-bit weights, slower: {missed.reason}\n"
    assert run(tiny_model, "--prompt", "Which city?") == 0
    assert capsys.readouterr().err == ""


def test_an_adapter_changes_it(
    tiny_model: Path, random_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_adapter("sql")
    assert run(tiny_model, "--prompt", "Which city?", "--adapter", str(folder), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == said_after(tiny_model, ASKED, 12, folder) != said_after(tiny_model, ASKED, 12)
    assert result["prompt_tokens"] > 0 and 0 < result["tokens"] <= 12 and result["seconds"] > 0


def test_the_prompt_is_put_as_the_adapters_rows_were(
    tiny_model: Path, random_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"format": "plain", "prompt": "Ask: {question}", "separator": " = "}
    folder = random_adapter("sql", recipe={"data": data})
    for more, put in (
        ([], "Ask: Which city? = "),
        (["--format", "plain"], "Ask: Which city? = "),
        (["--format", "chat"], ASKED),
        (["--raw"], "Which city?"),
    ):
        assert run(tiny_model, "--prompt", "Which city?", "--adapter", str(folder), *more) == 0
        assert capsys.readouterr().out == said_after(tiny_model, put, 12, folder) + "\n"
    assert run(tiny_model, "--prompt", "Which city?", "--format", "plain") == 0
    assert capsys.readouterr().out == said_after(tiny_model, "Which city?\n", 12) + "\n"


def test_raw_text_system_message_and_standard_input(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick brown"))
    assert run(tiny_model, "--prompt", "-", "--raw") == 0
    assert capsys.readouterr().out == said_after(tiny_model, "the quick brown", 12) + "\n"
    assert run(tiny_model, "--prompt", "Which city?", "--system", "Be brief.") == 0
    assert (
        capsys.readouterr().out
        == said_after(tiny_model, "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED, 12) + "\n"
    )


def test_a_seed_repeats_and_another_differs(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert run(tiny_model, "--prompt", "x", "--temperature", "1.5", "--top-p", "0.95", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_answer(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = said_after(tiny_model, ASKED, 12)
    stop = whole[4:6]
    assert run(tiny_model, "--prompt", "Which city?", "--stop", stop, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == whole[: whole.index(stop)] and result["stopped"] is True


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "-"], "standard input held nothing"),
        (["--prompt", "x", "--top-p", "0.5"], "give a temperature above 0"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be above 0"),
        (["--prompt", "x", "--raw", "--system", "s"], "plain text has no system message"),
        (["--prompt", "x", "--format", "alpaca"], "format is 'alpaca', should be one of chat, plain, raw"),
        (["--prompt", "x", "--max-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--prompt", "x " * 500], "positions"),
    ],
)
def test_bad_input(
    tiny_model: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert invoke(["generate", str(tiny_model), *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_an_adapter_that_does_not_fit(
    tiny_model: Path,
    made_model: Callable[..., Path],
    random_adapter: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = made_model(tmp_path / "wider", hidden_size=48)
    folder = random_adapter("wide", model=other)
    assert run(tiny_model, "--prompt", "x", "--adapter", str(folder)) == 2
    err = capsys.readouterr().err
    assert "does not fit" in err and "wide" in err
