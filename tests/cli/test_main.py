"""The front door: verbs found by their files, and every way a verb can end as one message and an exit status."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import veneer.cli.main as main
from veneer.cli.main import invoke, usage, verbs
from veneer.errors import ConfigError, DiskError, Refused

Failing = Callable[[BaseException | None], None]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Make `veneer list` end as told, once it runs."""

    def install(error: BaseException | None) -> None:
        def command(number: int = 0) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(main, "import_module", lambda name: SimpleNamespace(command=command))

    return install


WAYS = [
    (ConfigError("rank is 0\nset it to 8"), 2, "veneer: rank is 0\nset it to 8\n"),
    (DiskError("out was not written"), 1, "veneer: out was not written\n"),
    (Refused("it differs"), 3, "veneer: it differs\n"),
    (KeyboardInterrupt(), 1, "veneer: interrupted. Files written so far are whole.\n"),
    (KeyboardInterrupt("Run it again."), 1, "veneer: interrupted. Run it again.\n"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1,
     "veneer: a/b: Permission denied. Change its permissions, or name another place.\n"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 1,
     "veneer: a/b: Not a directory. A part of this path is a file where a folder was expected; check the path.\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 1,
     "veneer: No space left on device. The disk is full; free some space and run again.\n"),
    (FileNotFoundError("a model's words"), 1, "veneer: a model's words.\n"),
    (OSError(), 1, "veneer: OSError.\n"),
    (OSError(errno.EIO, "Input/output error", "disk"), 1, "veneer: disk: Input/output error.\n"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "status", "said"), WAYS, ids=[repr(w[0]) for w in WAYS])
def test_how_a_verb_fails(
    error: BaseException, status: int, said: str, ends: Failing, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(error)
    assert invoke(["list"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", said)


def test_how_a_verb_ends_well(ends: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    ends(None)
    assert invoke(["list"]) == 0
    assert invoke(["list", "--number", "x"]) == 2
    assert "Invalid value for '--number'" in capsys.readouterr().err


def test_our_own_mistakes_are_not_hidden(ends: Failing) -> None:
    ends(AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        invoke(["list"])


def test_messages_are_shown_as_they_are(ends: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    ends(ConfigError("rows[/bold] :x: " + "long " * 60))
    assert invoke(["list"]) == 2
    assert capsys.readouterr().err == "veneer: rows[/bold] :x: " + "long " * 60 + "\n"


def test_ctrl_c_while_a_verb_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "import_module", interrupted)
    assert invoke(["list"]) == 1
    assert capsys.readouterr().err == "veneer: interrupted. Nothing was done yet.\n"


def test_every_verb_is_a_file_with_a_summary() -> None:
    assert {"chat", "data", "demo", "doctor", "eval", "generate", "merge", "train"} <= verbs().keys()
    assert {"main", "console", "__init__"}.isdisjoint(verbs())
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in usage().splitlines() if line.startswith("  ")}
    assert lines.keys() == verbs().keys() and all(text.endswith(".") for text in lines.values())


@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["help"]])
def test_help_and_version(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(asked) == 0
    assert capsys.readouterr().out == usage() + "\n"
    assert invoke(["--version"]) == 0
    assert capsys.readouterr().out.count(".") >= 1
    assert invoke([]) == 2


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["mrge"]) == 2
    assert "there is no command 'mrge'. Did you mean 'merge'? There are: chat, data, demo" in capsys.readouterr().err


def test_help_is_quick_and_a_reader_that_goes_away_is_no_error() -> None:
    script = (
        "import os, sys\n"
        "from veneer.cli import main\n"
        "from types import SimpleNamespace\n"
        "main.usage()\n"
        "assert 'torch' not in sys.modules\n"
        "def command() -> None:\n"
        "    while True:\n"
        "        print('x' * 1000)\n"
        "main.import_module = lambda name: SimpleNamespace(command=command)\n"
        "sys.exit(main.invoke(['list']))\n"
    )
    reading, writing = os.pipe()
    ended = subprocess.Popen([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert os.read(reading, 10) == b"x" * 10
    os.close(reading)
    _, err = ended.communicate(timeout=60)
    assert (ended.returncode, err) == (1, "")
