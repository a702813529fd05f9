"""What comes before the first step, and restarts: measured by the code that does it."""

from collections.abc import Callable
from typing import Any

import pytest

from veneer.base.load import load_model
from veneer.base.storage_config import BaseStorage
from veneer.disk.tensors import weight_files
from veneer.plan.meta_model import Plain
from veneer.plan.startup_time import (
    files_to_load,
    hashing_seconds,
    quantizing_seconds,
    restarting_seconds,
    stored_numbers,
)
from veneer.recipe.settings import Recipe
from veneer.train.restarts import Restarts

Make = Callable[..., Recipe]
LINEAR = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
"""Numbers in the tiny model's linear layers: query and output, key and value, the three of the MLP."""


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes between any two looks at the clock."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("veneer.plan.startup_time.time.perf_counter", lambda: float(next(ticks)))


def test_weights_are_quantized_once(recipe: Make) -> None:
    dense, nf4 = Plain.of(recipe()), Plain.of(recipe(**{"storage.name": "nf4"}))
    assert files_to_load(dense) == (weight_files(dense.folder), False)
    assert files_to_load(nf4) == (weight_files(nf4.folder), True)
    storage = nf4.storage
    assert isinstance(storage, BaseStorage)
    load_model(nf4.recipe.model, storage=storage)
    cached, fresh = files_to_load(nf4)
    assert not fresh and cached != weight_files(nf4.folder) and all(f.is_file() for f in cached)
    (cached[0].parent / "config.json").write_text("{}")  # what train will make anew
    assert files_to_load(nf4) == (weight_files(nf4.folder), True)


def test_a_number_costs_what_its_blocks_layers_took(recipe: Make, ticking: None) -> None:
    plain = Plain.of(recipe(**{"storage.name": "nf4"}))
    assert stored_numbers(plain.model()) == LINEAR and stored_numbers(Plain.of(recipe()).model()) == 0
    assert quantizing_seconds(plain) == 7 / (LINEAR / 2)  # seven layers of one block, a tick each


def test_a_byte_is_hashed_in_its_share_of_the_time(ticking: None) -> None:
    assert hashing_seconds() == 1 / 2**24


@pytest.mark.parametrize(
    "changes", [{}, {"storage.name": "nf4"}, {"method": {"name": "mora", "rank": 2, "variant": "sharing"}}]
)
def test_a_restart_in_the_middle_of_the_run_is_timed(
    changes: dict[str, Any], recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[int] = []
    real = Restarts.restart_

    def seen(self: Restarts, optimizer: Any, step: int) -> Any:
        deltas = self._adapter.deltas.values()
        finished.append(step if all(delta.past for delta in deltas) else 0)
        return {**real(self, optimizer, step), "seconds": 10.0}

    monkeypatch.setattr(Restarts, "restart_", seen)
    plain = Plain.of(recipe(restarts={"every": 2}, **{"train.warmup": 0}, **changes))
    found = restarting_seconds(plain, 11)  # after 2, 4, 6, 8 and 10 steps
    assert finished == [6]
    assert found == 10.0 / sum(plain.trained(plain.model()))
