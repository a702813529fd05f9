"""The code blocks of a Markdown file, and a way to run those that are shell commands."""

import io
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from veneer.cli.main import invoke

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    text: str
    line: int
    """Of its first line of text."""


def blocks(path: Path) -> list[Block]:
    """Every fenced block, in order; an unclosed one is an error."""
    found: list[Block] = []
    language, begin, lines = None, 0, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```") and language is None:
            language, begin, lines = line[3:].strip(), number + 1, []
        elif line == "```" and language is not None:
            found.append(Block(language, "\n".join(lines) + "\n", begin))
            language = None
        else:
            lines.append(line)
    assert language is None, f"{path}:{begin}: this block is not closed"
    return found


def targets() -> set[str]:
    """What `make` can be asked for."""
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert phony is not None
    return set(phony[1].split())


def run_shell(block: Block) -> None:
    """Run each line: `veneer` here and now; of `make` only that the target exists; anything else is an error."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words == [".", ".venv/bin/activate"]:
            continue
        if words[0] == "make":
            asked = {w for w in words[1:] if "=" not in w}
            assert asked <= targets(), f"line {block.line}: make has no target {asked - targets()}"
            continue
        assert words[0] == "veneer", f"line {block.line}: no test knows how to run {line!r}"
        with mock.patch.object(sys, "stdin", io.StringIO("Who is in Rome?\n/quit\n")):
            assert invoke(words[1:]) == 0, f"{line!r} failed"


def run(block: Block, page: Path, folder: Path) -> None:
    """YAML is written to the file that its first line names; Python is executed; shell lines are run; JSON is read."""
    where = f"{page.name}:{block.line}"
    if block.language == "yaml":
        name = block.text.partition("\n")[0].removeprefix("# ")
        assert name.endswith(".yaml"), f"{where}: the first line should be a comment with a file's name"
        (folder / name).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, where, "exec"), {"__name__": "page"})
    elif block.language == "json":
        json.loads(block.text)
    else:
        assert block.language == "sh", f"{where}: no test runs blocks of {block.language!r}"
        run_shell(block)
