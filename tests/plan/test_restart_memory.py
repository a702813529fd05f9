"""What finished cycles take is foreseen as it then is."""

from collections.abc import Callable
from typing import Any

import pytest

from veneer.plan.meta_model import Plain
from veneer.plan.restart_memory import Cycles, cycles_of
from veneer.recipe.settings import Recipe
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("method", "storage"),
    [
        ({"name": "lora"}, "dense"),
        ({"name": "dora"}, "nf4"),
        ({"name": "lora", "init": "pissa"}, "dense"),
        ({"name": "mora", "variant": "sharing", "groupings": 2}, "nf4"),
        ({"name": "mora", "variant": "sharing", "groupings": 2}, "dense"),
    ],
    ids=str,
)
def test_past_and_copies_are_those_of_a_run(recipe: Make, method: dict[str, Any], storage: str) -> None:
    settings = {"rank": 2, **method}
    more = {"restarts": {"every": 2, "warmup": 1}, "train.steps": 8, "train.warmup": 0, "storage.name": storage}
    made = recipe(method=settings, **more)
    plain = Plain.of(made)
    found = cycles_of(plain, plain.model(), 8)
    _, job = train_recipe(made)
    assert job is not None
    assert found.past == sum(4 * t.numel() for d in job.adapter.deltas.values() for t in d.past.values())
    weights = [job.base.network.get_submodule(path)._parameters.get("weight") for path in job.adapter.deltas]
    assert found.base == (sum(w.nbytes for w in weights if w is not None) if storage == "dense" else 0)


def test_without_restarts_there_is_nothing_and_beside_no_copy(recipe: Make) -> None:
    plain = Plain.of(recipe())
    assert cycles_of(plain, plain.model(), 8) == Cycles()
    beside = Plain.of(recipe(restarts={"every": 2, "fold": "beside"}))
    found = cycles_of(beside, beside.model(), 3)
    assert found == Cycles(past=4 * sum(beside.trained(beside.model())))
