"""The optimizer is timed on tensors like the recipe's, and carried on to all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.plan import optimizer_timing
from veneer.plan.meta_model import Plain
from veneer.plan.optimizer_timing import optimizer_seconds
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.bits": 8},
        {"optimizer.in_backward": True},
        {"optimizer": {"name": "sgd", "momentum": 0.9}},
        {"optimizer": {"name": "adafactor"}},
    ],
)
def test_seconds_of_every_optimizer(changes: dict[str, Any], recipe: Make, tmp_path: Path) -> None:
    plain = Plain.of(recipe(**changes))
    like = plain.change(plain.model(2)).named()
    assert 0 < optimizer_seconds(plain.recipe, like, 50_000, tmp_path, paged=False) < 1


def test_more_numbers_than_are_stepped_take_longer_in_proportion(
    recipe: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    plain = Plain.of(recipe())
    like = plain.change(plain.model(2)).named()
    have = sum(n.parameter.numel() for n in like)
    monkeypatch.setattr(optimizer_timing, "MOST", 2 * have)
    ticks = iter(range(1000))
    monkeypatch.setattr("veneer.plan.optimizer_timing.time.perf_counter", lambda: next(ticks))
    made: list[int] = []
    real = optimizer_timing.build_optimizer

    def build(named: Any, *rest: Any) -> Any:
        made.append(sum(n.parameter.numel() for n in named))
        return real(named, *rest)

    monkeypatch.setattr(optimizer_timing, "build_optimizer", build)
    assert optimizer_seconds(plain.recipe, like, 10 * have, tmp_path, paged=False) == 5.0  # a tick for 2 of 10
    assert optimizer_seconds(plain.recipe, like, have, tmp_path, paged=False) == 1.0
    assert made == [2 * have, have]


def test_paged_state_lies_in_the_folder(recipe: Make, tmp_path: Path, monkeypatch: Any) -> None:
    plain = Plain.of(recipe())
    like = plain.change(plain.model(2)).named()
    folders: list[Path] = []

    def never(folder: Path, nbytes: int) -> None:
        folders.append(folder)
        raise InterruptedError

    monkeypatch.setattr("veneer.train.optim.adamw.Pages", never)
    with pytest.raises(InterruptedError):
        optimizer_seconds(plain.recipe, like, 1000, tmp_path, paged=True)
    assert folders == [tmp_path]
