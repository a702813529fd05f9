"""The loss on held-out rows, against one document at a time through the model's logits."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from veneer.recipe.settings import Recipe
from veneer.train.eval_loss import mean_loss
from veneer.train.setup import prepare


@pytest.mark.parametrize("packing", [True, False])
def test_it_is_the_mean_over_supervised_tokens(job: Callable[..., Recipe], packing: bool) -> None:
    recipe = job(**{"data.packing": packing})
    ready = prepare(recipe)
    losses = []
    with torch.no_grad():
        for e in ready.examples:
            ids = torch.from_numpy(e.tokens.astype("int64"))
            logits = ready.model(input_ids=ids[None]).logits[0]
            mask = torch.from_numpy(e.supervised)[1:]
            losses += F.cross_entropy(logits[:-1][mask], ids[1:][mask], reduction="none").tolist()
    assert mean_loss(ready.model, ready.examples, recipe) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_it_uses_no_chance_and_no_gradient(job: Callable[..., Recipe]) -> None:
    recipe = job(method={"name": "lora", "init": "random", "dropout": 0.9})
    ready = prepare(recipe)
    before = torch.get_rng_state()
    assert mean_loss(ready.model, ready.examples, recipe) == mean_loss(ready.model, ready.examples, recipe)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in ready.adapter.parameters())
