"""Changes and differences are each other's inverse, and a changed recipe is checked like any other."""

import pytest

from veneer.errors import ConfigError
from veneer.recipe.load import recipe_from
from veneer.recipe.overrides import differences, with_changes

BEFORE = recipe_from({"model": "m", "run": "r", "data": {"train": "rows.jsonl"}})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.micro_batch_tokens": 512},
        {"train.recompute": True, "memory.page_activations": True},
        {"storage.name": "nf4", "optimizer.bits": 8},
        {"run": "other"},
    ],
)
def test_there_and_back(changes: dict[str, object]) -> None:
    after = with_changes(BEFORE, changes) if "run" not in changes else BEFORE.model_copy(update=changes)
    assert differences(BEFORE, after) == changes


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="page_activations"):
        with_changes(BEFORE, {"memory.page_activations": True})
