"""A recipe over the tiny model, and its rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.train.recipe import recipe_from
from veneer.train.settings import Recipe


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What other tests have quantized is not there."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(**{"train.recompute": True})`: 12 rows, two micro-batches a step."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "the order of the count " * (1 + i % 4), "completion": "name city"} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**changes: Any) -> Recipe:
        tree: dict[str, Any] = {
            "model": str(tiny_model),
            "run": str(tmp_path / "run"),
            "data": {"train": str(rows)},
            "method": {"name": "lora", "rank": 4},
            "optimizer": {"lr": 0.01},
            "memory": {},
            "storage": {},
            "train": {
                "steps": 2,
                "tokens_per_step": 256,
                "micro_batch_tokens": 128,
                "max_length": 128,
                "dtype": "float32",
            },
        }
        for dotted, value in changes.items():
            section, _, key = dotted.rpartition(".")
            (tree[section] if section else tree)[key] = value
        return recipe_from(tree)

    return make
