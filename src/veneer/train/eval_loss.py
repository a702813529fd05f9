"""The loss on examples that are not trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.data.example import Example
from veneer.data.pack import Batch, collate, plan_batches
from veneer.recipe.settings import Recipe
from veneer.train.loss import head_of, hidden_states, summed_loss


def mean_loss(model: Any, examples: Sequence[Example], recipe: Recipe) -> float:
    """Mean loss a supervised token, in nats, with whatever is attached to the model now, dropout off."""
    total, count = 0.0, 0
    for members in micro_batches(examples, recipe):
        batch = collate([examples[i] for i in members])
        total += float(batch_loss(model, batch, packed=recipe.data.packing))
        count += len(batch.targets)
    return total / count


@torch.no_grad()
def batch_loss(model: Any, batch: Batch, *, packed: bool) -> Tensor:
    """The loss of one micro-batch, summed over its supervised tokens, in nats; no gradient is kept."""
    hidden = hidden_states(model, batch, packed=packed)
    return summed_loss(hidden, batch.targets, head_of(model), model.config.get_text_config().vocab_size)


def micro_batches(examples: Sequence[Example], recipe: Recipe) -> list[list[int]]:
    """Numbers of the examples that are computed together."""
    settings = recipe.train
    steps = plan_batches(
        [len(e) for e in examples],
        max_length=settings.max_length,
        tokens_per_step=8 * settings.max_length,
        micro_batch_tokens=settings.micro_batch_tokens,
        seed=0,
        epoch=0,
        packing=recipe.data.packing,
    )
    return [members for step in steps for members in step]
