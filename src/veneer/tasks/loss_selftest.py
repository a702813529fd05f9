"""Before the first step: does the packed forward pass with the chunked head agree with the network itself?"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from veneer.base.base import Base
from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.errors import ModelError
from veneer.models.attention import check_packable
from veneer.tasks.lm_loss import head_of, hidden_states

TOKENS = 16
"""Most tokens of each of the two documents that are compared; few, so that a leak across their border weighs much."""
LIMITS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest relative difference of logits (Frobenius) by dtype: far above rounding, far below a mixing of documents."""


def check_fast_paths(base: Base, examples: Sequence[Example], *, packed: bool) -> None:
    """Compare the packed forward pass and the chunked head with the plain network on two short documents.

    Raises ModelError that says what differs and what to do; unusual architectures are found here, before training.
    The adapter's dropout should be off.
    """
    documents = [_shortened(e) for e in examples[:2]]
    if packed:
        check_packable(base.network)
    where = base.device.torch_device
    with torch.no_grad():
        ids = [torch.as_tensor(d.tokens, dtype=torch.int64, device=where)[None] for d in documents]
        plain = [base.network(input_ids=i).logits[0] for i in ids]
        fast = []
        for members in [documents] if packed else [[d] for d in documents]:
            batch = collate(members).to(where)
            everywhere = torch.arange(batch.input_ids.shape[1], device=where)
            fast.append(head_of(base)(hidden_states(base, replace(batch, supervised=everywhere), packed=packed)))
    ours, own, limit = torch.cat(fast).float(), torch.cat(plain).float(), LIMITS[plain[0].dtype]
    difference = float((ours - own).norm() / own.norm().clamp_min(1e-30))
    if not difference < limit:
        way = "set data.packing to false" if packed else "this architecture computes its logits in a way not known here"
        raise ModelError(
            f"{base.kind}: the loss computed the fast way differs from the model's own by {difference:.2g} "
            f"(at most {limit} is rounding); {way}"
        )


def _shortened(example: Example) -> Example:
    return replace(example, tokens=example.tokens[:TOKENS], supervised=example.supervised[:TOKENS])
