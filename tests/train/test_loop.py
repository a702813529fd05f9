"""Whole runs on the tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

from veneer.train.loop import train
from veneer.train.settings import Recipe

Make = Callable[..., Recipe]


def weights(run: str | Path) -> bytes:
    return (Path(run) / "adapter" / "adapter_model.safetensors").read_bytes()


def events(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "events.jsonl").read_text().splitlines()]


def test_a_run_learns_and_says_so(job: Make) -> None:
    recipe = job(**{"train.steps": 30, "data.rows": 6, "method": {"name": "lora", "rank": 8}})
    told = []
    outcome, done = train(recipe, [told.append])
    assert [e["step"] for e in events(recipe.run)] == list(range(1, 31)) == [e.step for e in told]
    assert events(recipe.run)[-1]["loss"] < 0.5 * events(recipe.run)[0]["loss"]
    assert outcome.steps == 30
