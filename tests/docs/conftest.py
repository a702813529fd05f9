"""A folder in which the README's commands run: the alias of the real model is a tiny one, rows are as described."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.models.sources import FORMAT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def documented_model(made_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that 4-bit blocks of 64 fit into."""
    return made_model(tmp_path_factory.mktemp("models") / "documented", hidden_size=64)


@pytest.fixture
def workplace(documented_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a cache that holds the tiny model under the name of smollm2-135m-instruct."""
    cached = tmp_path / "cache" / "models" / f"smollm2-135m-instruct-v{FORMAT}"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(documented_model)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def rows(workplace: Path) -> None:
    """train.jsonl and held_out.jsonl with the columns of the line that the README shows."""
    shown = re.search(r"`(\{\".*?\})`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown is not None, "the README shows no line of the file it describes"
    columns = json.loads(shown[1])
    for name, count in (("train", 12), ("held_out", 4)):
        lines = [{key: f"{value} {name} {i}" for key, value in columns.items()} for i in range(count)]
        (workplace / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
