"""Every piece is timed by the code that trains, and recomputed blocks do their work again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.plan import block_timing
from veneer.plan.activation_trace import largest_batches
from veneer.plan.block_timing import Pieces, pieces
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import Recipe
from veneer.train.job import order_of_steps, read_job

Make = Callable[..., Recipe]


class Ticking:
    """A clock that goes on by what the code in between has cost: 1 for each reading, or what `cost` says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def timed(recipe: Recipe, again: bool = False, ran: Any = lambda _: None) -> Pieces:
    rows = read_job(recipe)
    order = order_of_steps([len(e) for e in rows.examples], recipe.train, packing=recipe.data.packing)
    batch = largest_batches(recipe, rows.examples, order)[0]
    return pieces(Plain.of(recipe), batch, again, ran)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"storage.name": "nf4", "train.recompute": True},
        {"train.recompute": True, "memory.page_activations": True},
        {"data.packing": False},
        {"method": {"name": "adalora"}},
        {"method": {"name": "none"}, "prompt": {"name": "prefix"}},
        {"prompt": {"name": "prompt"}},
        {"method": {"name": "lora", "init": "eva"}},
        {"optimizer.in_backward": True, "train.micro_batch_tokens": 256},
    ],
)
def test_every_kind_of_recipe_is_timed(changes: dict[str, Any], recipe: Make, tmp_path: Path) -> None:
    wanted = recipe(**changes)
    found = timed(wanted, again=wanted.train.recompute is True)
    for name in ("forward", "backward", "head", "head_forward"):
        assert getattr(found, name) > 0, name
    assert found.change >= 0 and found.outside >= 0  # of tiny blocks, the difference may be none


def test_pieces_are_what_the_clock_said(recipe: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("veneer.plan.block_timing.time.perf_counter", Ticking())
    monkeypatch.setattr(block_timing, "ENOUGH", 0.0)
    told: list[int] = []
    found = timed(recipe(), ran=told.append)
    # a tick between any two neighbors: 5 forward, 2 backward, the second block 1 of each
    assert found.outside == 3.0 and found.forward == 1.0 and found.backward == 1.0 and found.change == 0.5
    assert found.head == found.head_forward > 0
    assert told == [1, 1, 1]  # one left out, two that count
