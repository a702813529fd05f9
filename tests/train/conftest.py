"""Tiny jobs: a few rows of text, and recipes over them that train the tiny model in a second."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_recipe
from veneer.recipe.settings import Recipe

WORDS = ["city", "customer", "the", "largest", "number", "of", "count", "name", "order", "employees", "hired", "after"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 prompts and completions, from 1 to 12 words each."""
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_rows(path)
    return path


def write_rows(path: Path) -> None:
    rng = random.Random(0)
    lines = [
        {"prompt": " ".join(rng.choices(WORDS, k=1 + i % 12)), "completion": " ".join(rng.choices(WORDS, k=1 + i % 5))}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs compared bit by bit have to add up in the same order, and tiny products are slower on two threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(tiny_model: Path, rows: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`job("run", **{"train.steps": 3})`: a recipe of 6 steps, about 2.5 of them an epoch, with dropout."""

    def make(run: str = "run", **changes: Any) -> Recipe:
        own = {"method": {"name": "lora", "rank": 4, "dropout": 0.2}, "train.steps": 6}
        return tiny_recipe(tiny_model, rows, tmp_path / run, **{**own, **changes})

    return make
