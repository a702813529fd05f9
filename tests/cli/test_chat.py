"""`veneer chat` reads lines, answers, remembers, and switches adapters; here standard input is no terminal."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.greedy import said_after
from veneer.cli.chat import _adapter_names
from veneer.cli.main import invoke
from veneer.errors import ConfigError


def said(folder: Path, messages: list[str], adapter: Path | None = None, system: str = "") -> str:
    """transformers' own greedy answer to user and assistant messages in turn."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for number, message in enumerate(messages):
        text += f"<|im_start|>{'assistant' if number % 2 else 'user'}\n{message}<|im_end|>\n"
    return said_after(folder, text + "<|im_start|>assistant\n", 8, adapter)


@pytest.fixture
def chat(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    def run(lines: str, *more: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = invoke(["chat", str(tiny_model), "--dtype", "float32", "--max-tokens", "8", *more])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_turns_are_remembered_until_reset(tiny_model: Path, chat: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = chat("Which city?\n\nand?\n/reset\nand?\n")
    first = said(tiny_model, ["Which city?"])
    second = said(tiny_model, ["Which city?", first, "and?"])
    assert status == 0
    assert out == f"{first}\n{second}\n{said(tiny_model, ['and?'])}\n"


def test_adapters_are_switched(
    tiny_model: Path, chat: Callable[..., tuple[int, str, str]], random_adapter: Callable[..., Path]
) -> None:
    sql, math = random_adapter("sql", seed=1), random_adapter("math", seed=2)
    lines = "one\n/reset\n/adapter math\none\n/reset\n/adapter none\none\n/adapter\n/quit\nnever\n"
    status, out, err = chat(lines, "--adapter", f"db={sql}", "--adapter", str(math))
    answers = [said(tiny_model, ["one"], folder) for folder in (sql, math, None)]
    assert status == 0 and len(set(answers)) == 3
    assert out == "".join(f"{a}\n" for a in answers)
    assert "adapter db" in err and "  db\n  math\n* none" in err


def test_an_adapter_trained_on_plain_text_is_asked_so(
    tiny_model: Path, chat: Callable[..., tuple[int, str, str]], random_adapter: Callable[..., Path]
) -> None:
    """Each question by itself; the other adapter sees the whole conversation, and --format chat makes it one."""
    plain, other = random_adapter("sql", seed=1, recipe={"data": {"format": "plain"}}), random_adapter("math", seed=2)
    adapters = ("--adapter", str(plain), "--adapter", str(other))
    status, out, err = chat("one\ntwo\n/system Be brief.\none\n/system\n/adapter math\none\n", *adapters)
    alone = [said_after(tiny_model, f"{text}\n", 8, plain) for text in ("one", "two")]
    assert status == 0 and out == "".join(f"{a}\n" for a in [*alone, said(tiny_model, ["one"], other)])
    assert "adapter sql, trained on plain text: each question is answered by itself" in err
    assert "plain text has no system message" in err
    _, out, _ = chat("one\n", *adapters, "--format", "chat")
    assert out == said(tiny_model, ["one"], plain) + "\n"


def test_a_system_message(tiny_model: Path, chat: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = chat("one\n/system Be long.\none\n", "--system", "Be brief.")
    assert out == f"{said(tiny_model, ['one'], system='Be brief.')}\n{said(tiny_model, ['one'], system='Be long.')}\n"


def test_mistakes_do_not_end_the_talk(tiny_model: Path, chat: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = chat("/adaptr x\n/adapter sql\n/help\n" + "word " * 500 + "\none\n")
    assert status == 0 and out == said(tiny_model, ["one"]) + "\n"
    assert "there is no command /adaptr" in err
    assert "there is no adapter 'sql'. There are: none." in err
    assert "/adapter NAME" in err and "positions" in err


def test_ctrl_c_stops_the_answer_and_not_the_program(
    tiny_model: Path, chat: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import veneer.generate.chat_session as room

    real, calls = room.speak, 0

    def interrupted_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            kwargs["show"]("half an ans")
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "speak", interrupted_once)
    status, out, err = chat("one\ntwo\n")
    assert status == 0 and "(stopped)" in err
    assert out == f"half an ans\n{said(tiny_model, ['one', 'half an ans', 'two'])}\n"


def test_bad_input(chat: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, err = chat("one\n", "--adapter", "none=x")
    assert status == 2 and "the adapter name 'none' cannot be used" in err and out == ""
    status, _, err = chat("one\n", "--adapter", str(tmp_path / "absent"))
    assert status == 2 and "absent" in err
    status, _, err = chat("one\n", "--top-k", "3")
    assert status == 2 and "give a temperature above 0" in err


def test_adapter_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["a=x/y", "runs/sql/adapter", "math/"]
    assert _adapter_names(given) == {"a": Path("x/y"), "sql": Path("runs/sql/adapter"), "math": Path("math")}
    for wrong, why in ((["a=x", "a=y"], "'a' is given twice"), (["none=x"], "'none' cannot"), (["=x"], "'' cannot")):
        with pytest.raises(ConfigError, match=why):
            _adapter_names(wrong)
