"""A made model that all methods fit, rows to learn, and one job on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import prepared
from veneer.recipe.load import recipe_from

ROWS = [{"question": f"How many are {a} and {b}?", "equation": f"{a} + {b}"} for a, b in ((1, 2), (30, 4), (5, 66))]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, made_model: Callable[..., Path]) -> Path:
    """Two blocks with as many key-value heads as heads, so that MoRA of rank 8 fits every linear layer."""
    folder = tmp_path_factory.mktemp("claims") / "model"
    return made_model(folder, num_key_value_heads=4)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("claims-rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def training(model: Path, rows: Path) -> Any:
    """With a delta on block 1 that changes something."""
    tree = {
        "model": str(model),
        "data": {"train": str(rows), "prompt": "{question}", "completion": "{equation}", "format": "plain"},
        "method": {"name": "lora", "init": "random", "layers": [1]},
        "train": {"dtype": "float32"},
        "run": "nowhere",
    }
    return prepared(recipe_from(tree))
