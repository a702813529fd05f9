"""A folder as a user has it: rows, a recipe, and an earlier run that nothing that follows may harm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.cli.main import invoke

Recipe = Callable[..., Path]


def write_rows(path: Path) -> None:
    """40 questions and answers that a tiny model can learn by heart."""
    rows = [{"question": f"how many {n % 8}?", "answer": f"SELECT {n % 8}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_text(model: Path, **changes: Any) -> str:
    """A recipe a line a key; `changes` outrank by dotted name."""
    keys: dict[str, Any] = {
        "model": str(model),
        "run": "run",
        "data.train": "rows.jsonl",
        "data.prompt": "{question}",
        "data.completion": "{answer}",
        "method.name": "lora",
        "method.rank": 2,
        "optimizer.lr": 0.02,
        "train.steps": 5,
        "train.tokens_per_step": 128,
        "train.max_length": 64,
        "train.dtype": "float32",
        **changes,
    }
    sections: dict[str, list[str]] = {}
    for key, value in keys.items():
        section, _, leaf = key.rpartition(".")
        lines = sections.setdefault(section, [f"{section}:"] if section else [])
        lines.append(f"{'  ' if section else ''}{leaf}: {json.dumps(value)}")
    return "".join(f"{line}\n" for lines in sections.values() for line in lines)


@pytest.fixture(scope="session")
def earlier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("earlier")
    write_rows(folder / "rows.jsonl")
    settings = {"run": str(folder / "run"), "data.train": str(folder / "rows.jsonl"), "train.checkpoint_every": 3}
    (folder / "recipe.yaml").write_text(recipe_text(tiny_model, **settings))
    assert invoke(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def home(tiny_model: Path, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: rows.jsonl, recipe.yaml (as `recipe` writes it) and the finished run `earlier`."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(recipe_text(tiny_model))
    shutil.copytree(earlier, tmp_path / "earlier")
    return tmp_path
