"""The padded batches that PEFT trains on in benchmarks/runs.py."""

import numpy as np

from benchmarks.runs import collate_padded
from veneer.data.example import Example


def example(tokens: list[int], supervised: list[int]) -> Example:
    mask = np.zeros(len(tokens), dtype=np.bool_)
    mask[supervised] = True
    return Example(np.array(tokens, dtype=np.int32), mask, "x", 1)


def test_collate_padded() -> None:
    ids, attention, labels = collate_padded([example([5, 6, 7], [2]), example([8], [])], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert attention.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7], [-100, -100, -100]]
