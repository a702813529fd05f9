"""A run that cannot fit ends before its weights are read; one that may fit goes on."""

from collections.abc import Callable
from typing import Any

import pytest

from veneer.errors import ModelError, Refused
from veneer.plan import refuse
from veneer.plan.refuse import refusing
from veneer.train.loop import train
from veneer.train.settings import Recipe

Make = Callable[..., Recipe]


def test_too_small_a_budget_is_refused_before_loading(recipe: Make, monkeypatch: Any) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("veneer.train.prepare.load_base", never)
    with pytest.raises(
        Refused, match=r"(?s)will not fit; nothing was loaded:\n  memory: .* but memory.budget leaves 1 MiB"
    ) as e:
        train(recipe(**{"memory.budget": "1MiB"}), check=refusing(lambda _: None))
    assert e.value.exit_status == 3


def test_force_says_it_and_trains(recipe: Make) -> None:
    said: list[str] = []
    outcome, _ = train(recipe(**{"memory.budget": "1MiB"}), check=refusing(said.append, force=True))
    assert outcome.steps == 2
    assert len(said) == 1 and said[0].startswith("may not fit: memory: ")


def test_what_fits_says_nothing(recipe: Make) -> None:
    said: list[str] = []
    train(recipe(**{"memory.budget": "64GiB"}), check=refusing(said.append))
    assert said == []


def test_a_model_that_cannot_be_sized_is_trained(recipe: Make, monkeypatch: Any) -> None:
    def unknown(*_: Any) -> None:
        raise ModelError("no blocks")

    monkeypatch.setattr(refuse, "estimate", unknown)
    said: list[str] = []
    refusing(said.append)(recipe(), None, [])  # type: ignore[arg-type]
    assert said == ["whether it fits is not known: no blocks"]
