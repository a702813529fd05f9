"""Before the first step: does the fast way of computing the loss mean what the model itself means?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.errors import ModelError
from veneer.models.attention import check_packable
from veneer.train.loss import head_of, hidden_states

TOKENS = 16
"""Most tokens of each of the two documents that are compared; few, so that a leak across their border weighs much."""
LIMITS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest relative difference of logits (Frobenius) by dtype: far above rounding, far below a mixing of documents."""


def check_fast_paths(model: Any, examples: Sequence[Example], *, packed: bool) -> None:
    """Compare the packed forward and the chunked head with the plain model on two short documents.

    Raises ModelError that names what differs and how to go on; unusual architectures are found here, before training.
    The adapter's dropout should be off.
    """
    documents = [_shortened(e) for e in examples[:2]]
    if packed:
        check_packable(model)
    with torch.no_grad():
        plain = [model(input_ids=torch.as_tensor(d.tokens, dtype=torch.int64)[None]).logits[0] for d in documents]
        batches = [documents] if packed else [[d] for d in documents]
        fast = []
        for members in batches:
            batch = collate(members)
            batch_all = type(batch)(
                batch.input_ids, batch.position_ids, batch.starts, torch.arange(batch.input_ids.shape[1]), batch.targets
            )
            fast.append(head_of(model)(hidden_states(model, batch_all, packed=packed)))
    difference, limit = _relative(torch.cat(fast).float(), torch.cat(plain).float()), LIMITS[plain[0].dtype]
    if not difference < limit:
        way = "set data.packing to false" if packed else "this architecture computes its logits in a way not known here"
        raise ModelError(
            f"{type(model).__name__}: the loss computed the fast way differs from the model's own by {difference:.2g} "
            f"(at most {limit} is rounding); {way}"
        )


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _shortened(example: Example) -> Example:
    return type(example)(example.tokens[:TOKENS], example.supervised[:TOKENS], example.source, example.line)
