"""A shortened model computes what the whole one does, for its own examples alone."""

import numpy as np
import pytest
import torch

from benchmarks.claims.frozen_prefix import shorten_
from veneer.data.pack import collate
from veneer.train.loss import head_of, hidden_states
from veneer.train.setup import Job


def test_hidden_states_and_logits_are_those_of_the_whole_model(job: Job) -> None:
    words = np.unique(np.concatenate([e.tokens for e in job.examples]))
    whole = collate(job.examples, 64)  # with padding
    expected = hidden_states(job.model, whole, packed=True)
    logits = head_of(job.model)(expected)[:, torch.from_numpy(words).long()]
    shorten_(job, 1)
    short = collate(job.examples, 64)
    hidden = hidden_states(job.model, short, packed=True)
    assert torch.allclose(hidden, expected, atol=1e-5)
    assert torch.allclose(head_of(job.model)(hidden), logits, atol=1e-4)
    assert torch.equal(torch.from_numpy(words).long()[short.targets], whole.targets)
    hidden.sum().backward()
    assert all(p.grad is not None for p in job.adapter.parameters())


def test_other_rows_are_refused(job: Job) -> None:
    shorten_(job, 1)
    example = job.examples[0]
    example.tokens[0] += 1
    with pytest.raises(KeyError, match="none of the job's examples"):
        hidden_states(job.model, collate([example]), packed=True)
