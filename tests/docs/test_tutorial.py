"""The tutorial runs from its first block to its last, on a tiny model."""

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks, run
from veneer.disk.adapter_dir import read_adapter

TUTORIAL = ROOT / "docs" / "tutorial.md"


def test_it_runs_and_prints_lines_like_those_it_shows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "examples", workplace / "examples")
    shown = []
    for block in blocks(TUTORIAL):
        if block.language == "text":
            shown += block.text.splitlines()
        else:
            run(block, TUTORIAL, workplace)
    said = capsys.readouterr()
    printed = {beginning(line) for line in (said.out + said.err).splitlines()}
    ours = [line for line in shown if not line.startswith(("You are", "<|im_start|>"))]  # the real model's template
    assert [line for line in ours if beginning(line) not in printed] == []
    assert (workplace / "models/tickets/model.safetensors").is_file()
    assert read_adapter(workplace / "runs/tickets-nf4/adapter").facts["recipe"]["storage"]["name"] == "nf4"


def beginning(line: str) -> str:
    """The words before the first number, or after it where the line begins with one."""
    words = re.match(r"[\d\s]*(\D*)", line)
    assert words is not None
    return " ".join(words[1].split())


def test_its_row_is_one_of_the_rows() -> None:
    row = next(block.text for block in blocks(TUTORIAL) if block.language == "json")
    assert row in (ROOT / "examples" / "tickets.jsonl").read_text(encoding="utf-8")
