"""How likely a model finds what it should write: the loss over supervised tokens, and perplexity = exp(loss)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.base.base import Base
from veneer.data.render import Example

BATCH_TOKENS = 2048
"""Tokens computed at once, padding included."""
LOGIT_ROWS = 1024
"""Positions whose logits are held at once; one long example may exceed it."""


@dataclass(frozen=True)
class Likelihood:
    """Negative log likelihoods in nats."""

    nats: list[float]
    """Each example's sum over its supervised tokens."""
    tokens: list[int]
    """Each example's supervised tokens."""

    @property
    def loss(self) -> float:
        """Nats per supervised token, over all examples."""
        return sum(self.nats) / max(sum(self.tokens), 1)

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def likelihood(base: Base, examples: Sequence[Example], advance: Callable[[int], object] | None = None) -> Likelihood:
    """Measure `base` on `examples`, in batches of similar length; `advance` is told how many more are done."""
    nats = [0.0] * len(examples)
    with base.evaluating(), torch.inference_mode():
        for batch in _batches(examples):
            for index, value in zip(batch, _batch_nats(base, [examples[i] for i in batch]), strict=True):
                nats[index] = value
            if advance is not None:
                advance(len(batch))
    return Likelihood(nats, [int(e.supervised.sum()) for e in examples])


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of examples of similar length, within the limits above."""
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        width = len(examples[batch[0]] if batch else examples[index])
        kept = max(width - _first(examples[i]) for i in (*batch, index))
        rows = len(batch) + 1
        if batch and (rows * width > BATCH_TOKENS or rows * kept > LOGIT_ROWS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _first(example: Example) -> int:
    """The first position whose logits are needed: one before the first supervised token."""
    return max(int(example.supervised.argmax()) - 1, 0)


def _batch_nats(base: Base, examples: Sequence[Example]) -> list[float]:
    """Right-padded, because nothing attends to what comes after; logits only from the first position needed."""
    width, begin = max(map(len, examples)), min(map(_first, examples))
    device = base.device.torch_device
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, supervised = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.tokens).long()
        mask[row, : len(example)] = 1
        supervised[row, : len(example)] = torch.from_numpy(example.supervised)
    ids, mask = ids.to(device), mask.to(device)
    wanted = supervised[:, begin + 1 :].to(device)
    keep = {"logits_to_keep": width - begin} if base.accepts("logits_to_keep") else {}
    logits: Tensor = base.network(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits[
        :, begin - width :
    ]
    losses = nn.functional.cross_entropy(logits[:, :-1][wanted].float(), ids[:, begin + 1 :][wanted], reduction="none")
    sums = torch.zeros(len(examples), dtype=torch.float64, device=device)
    sums.index_add_(0, wanted.nonzero()[:, 0], losses.double())
    return [float(s) for s in sums]
