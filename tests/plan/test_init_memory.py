"""What making deltas takes, against a process that makes them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plan.test_eval_memory import foreseen, measured
from veneer.adapters.layer_view import layer_at
from veneer.plan.init_memory import Beginning, beginning_of
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]


def test_a_decomposition_is_the_peak(made_model: Callable[..., Path], tmp_path: Path) -> None:
    method = {"name": "lora", "init": "pissa", "rank": 1, "targets": "model.layers.0.mlp.down_proj"}
    made = {"method": method, "storage": {"name": "nf4"}, "train": {"steps": 1}}
    found = measured(made_model, tmp_path, 5, hidden=1280, **made)
    assert found["moment"] == "beginning"
    assert sum(found["parts"].values()) == pytest.approx(found["peak"], rel=0.06)
    assert found["parts"]["first values of one layer"] > 0.1 * found["peak"]


def test_what_is_kept_besides_what_is_trained(recipe: Make) -> None:
    """PiSSA's first A and B are as large as A and B."""
    pissa, lora = (Plain.of(recipe(method={"name": "lora", "rank": 2, "init": i})) for i in ("pissa", "uniform"))
    model = pissa.model()
    assert beginning_of(pissa, model, 8).fixed == 4 * sum(pissa.trained(model))
    assert beginning_of(lora, model, 8).fixed == 0 == beginning_of(lora, model, 8).seen
    assert foreseen(recipe(method={"name": "lora", "rank": 2, "init": "pissa"})).parts["adapter"] == 8 * sum(
        pissa.trained(model)
    )


def test_what_eva_holds_while_it_looks(recipe: Make) -> None:
    """Of each layer twice the rank of directions and 8 more, their values, the mean and the variance."""
    plain = Plain.of(recipe(method={"name": "lora", "rank": 2, "init": "eva"}))
    model = plain.model()
    found = beginning_of(plain, model, 100)
    layers = [layer_at(model, path) for path in plain.targets(model)[1]]
    assert found.seen == sum(4 * (12 * layer.in_features + 12 + layer.in_features + 1) for layer in layers)
    rows = 4 * 100 * max(layer.in_features for layer in layers)
    assert 3 * rows < found.looking < 12 * rows


@pytest.mark.parametrize("method", ["adalora", "dora", "ia3", "bottleneck", "full"])
def test_every_method_can_be_followed(method: str, recipe: Make) -> None:
    plain = Plain.of(recipe(method={"name": method}))
    assert beginning_of(plain, plain.model(), 8).making > 0


def test_without_a_method_nothing_begins(recipe: Make) -> None:
    plain = Plain.of(recipe(prompt={"name": "prompt", "tokens": 5}, method={"name": "none"}))
    assert beginning_of(plain, plain.model(), 8) == Beginning()
