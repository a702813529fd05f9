"""A shortened model computes what the whole one does, for its own examples alone."""

import numpy as np
import pytest
import torch

from benchmarks.claims.frozen_prefix import shorten_
from veneer.data.pack import collate
from veneer.tasks.lm_loss import head_of, hidden_states
from veneer.train.setup import Training


def test_hidden_states_and_logits_are_those_of_the_whole_model(training: Training) -> None:
    words = np.unique(np.concatenate([e.tokens for e in training.job.examples]))
    whole = collate(training.job.examples, 64)  # with padding
    expected = hidden_states(training.base, whole, packed=True)
    logits = head_of(training.base)(expected)[:, torch.from_numpy(words).long()]
    training = shorten_(training, 1)
    short = collate(training.job.examples, 64)
    hidden = hidden_states(training.base, short, packed=True)
    assert torch.allclose(hidden, expected, atol=1e-5)
    assert torch.allclose(head_of(training.base)(hidden), logits, atol=1e-4)
    assert torch.equal(torch.from_numpy(words).long()[short.targets], whole.targets)
    hidden.sum().backward()
    assert all(p.grad is not None for p in training.adapter.parameters())


def test_other_rows_are_refused(training: Training) -> None:
    training = shorten_(training, 1)
    example = training.job.examples[0]
    example.tokens[0] += 1
    with pytest.raises(KeyError, match="none of the job's examples"):
        hidden_states(training.base, collate([example]), packed=True)
