"""First choices are counted as one forward pass a row, without packing, counts them."""

import pytest
import torch

from benchmarks.claims.token_accuracy import most_likely
from veneer.train.setup import Training


def test_shares_are_those_of_one_row_at_a_time(training: Training) -> None:
    right: list[list[bool]] = []
    for e in training.job.examples:
        tokens = torch.from_numpy(e.tokens).long()
        with torch.no_grad():
            choice = training.base.network(input_ids=tokens[None]).logits[0].argmax(-1)
        right.append([bool(choice[i - 1] == tokens[i]) for i in range(1, len(e)) if e.supervised[i]])
    tokens_right = sum(map(sum, right)) / sum(map(len, right))
    assert most_likely(training) == {"tokens_right": pytest.approx(tokens_right), "whole_right": 0.0}


def test_what_the_model_writes_itself_is_all_right(training: Training) -> None:
    for e in training.job.examples:
        for i in range(1, len(e)):
            if e.supervised[i]:
                with torch.no_grad():
                    logits = training.base.network(input_ids=torch.from_numpy(e.tokens[:i]).long()[None]).logits
                e.tokens[i] = int(logits[0, -1].argmax())
    assert most_likely(training) == {"tokens_right": 1.0, "whole_right": 1.0}
    last = training.job.examples[0]
    last.tokens[-1] = (last.tokens[-1] + 1) % 384
    assert most_likely(training)["whole_right"] == pytest.approx(2 / 3)
