"""What a model finds most likely, read off one forward pass with the right tokens in front of each position."""

import numpy as np
import torch

from veneer.data.pack import collate
from veneer.tasks.lm_loss import head_of, hidden_states
from veneer.train.setup import Training


def most_likely(training: Training, examples: str = "examples") -> dict[str, float]:
    """Shares of supervised tokens, and of whole completions, that are the model's first choice.

    A completion all of whose tokens are first choices is the one that greedy generation writes.
    """
    head, tokens, wholes = head_of(training.base), [], []
    members = getattr(training.job, examples)
    for i in range(0, len(members), 16):
        batch = collate(members[i : i + 16])
        with torch.no_grad():
            right = head(hidden_states(training.base, batch, packed=True)).argmax(-1) == batch.targets
        document = torch.bucketize(batch.supervised, batch.starts, right=True) - 1
        tokens += right.tolist()
        wholes += [bool(right[document == d].all()) for d in range(len(batch.starts) - 1)]
    return {"tokens_right": float(np.mean(tokens)), "whole_right": float(np.mean(wholes))}
