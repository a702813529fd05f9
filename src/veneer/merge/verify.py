"""Do two models say the same? Logits along given continuations, compared position by position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """How far a model's outputs are from another's, along the other's greedy texts."""

    rows: int
    max_drift: float
    """Largest difference of two logits."""
    relative_drift: float
    """Norm of all differences over the norm of all logits, each centered."""
    greedy_agreement: float
    """Share of rows whose greedy text is the same: the best token agrees at every position."""
    near_ties: int
    """Rows whose texts part where the first model's two best logits are closer than the drift."""


@torch.inference_mode()
def logits_along(model: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
    """Per row (C + 1, V) float32 logits that choose each of the C continuation tokens and what follows them."""
    rows = []
    for prompt, more in zip(prompts, continuations, strict=True):
        ids = torch.tensor([[*prompt, *more]])
        rows.append(model(input_ids=ids, logits_to_keep=len(more) + 1, use_cache=False).logits[0].float())
    return rows


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> Drift:
    """The drift of `second` from `first`, row by row as `logits_along` gives them."""
    largest = difference = size = 0.0
    same = ties = 0
    for a, b in zip(first, second, strict=True):
        largest = max(largest, float((a - b).abs().max()))
        centered_a, centered_b = (x - x.mean(-1, keepdim=True) for x in (a, b))
        difference += float((centered_a - centered_b).square().sum())
        size += float(centered_a.square().sum())
        apart = (a.argmax(-1) != b.argmax(-1)).nonzero().flatten()
        if len(apart) == 0:
            same += 1
        else:
            best = a[apart[0]].topk(2).values
            ties += int(best[0] - best[1] <= (a[apart[0]] - b[apart[0]]).abs().max() * 2)
    return Drift(len(first), largest, (difference / size) ** 0.5, same / len(first), ties)
