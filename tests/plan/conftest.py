"""A recipe over the tiny model, and its rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_recipe
from veneer.recipe.settings import Recipe


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What other tests have quantized or timed is not cached."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(**{"train.recompute": True})`: 12 rows, two micro-batches a step."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "the order of the count " * (1 + i % 4), "completion": "name city"} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**changes: Any) -> Recipe:
        return tiny_recipe(tiny_model, rows, tmp_path / "run", **{"train.steps": 2, **changes})

    return make
