"""Bytes of tensors without data are counted while they are alive."""

import torch

from veneer.base.memory_tracker import MemoryTracker

MB = 1 << 20


def meta(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.uint8, device="meta")


def test_counts_what_is_alive_and_the_most_that_was() -> None:
    with MemoryTracker() as tracker:
        a = meta(3 * MB)
        b = meta(2 * MB)
        assert tracker.live == tracker.peak == 5 * MB
        del b
        assert (tracker.live, tracker.mark()) == (3 * MB, 5 * MB)
        assert tracker.peak == 3 * MB
        c = a.view(3, MB)[1]  # the same storage
        assert tracker.live == 3 * MB
        del a, c
        assert tracker.live == 0


def test_what_is_known_is_not_counted() -> None:
    weight = meta(MB)
    with MemoryTracker([weight]) as tracker:
        weight.view(2, -1)
        assert tracker.live == 0


def test_what_autograd_keeps_is_alive_until_the_backward_pass() -> None:
    x = torch.empty(256, 1024, device="meta", requires_grad=True)
    with MemoryTracker([x]) as tracker:
        y = x.exp()  # keeps its result
        z = y.sin().sum()  # keeps its input
        del y
        assert tracker.live == 256 * 1024 * 4 + 4
        z.backward()  # type: ignore[no-untyped-call]
        del z
        assert tracker.live == 256 * 1024 * 4  # the gradient


def test_numbers_that_are_not_there_are_one_and_real_tensors_keep_theirs() -> None:
    with MemoryTracker():
        assert torch.zeros((), device="meta").item() == 1.0
        assert torch.full((), 7).item() == 7


def test_a_copy_of_numbers_that_are_not_there_changes_nothing() -> None:
    real = torch.arange(3)
    with MemoryTracker():
        assert real.copy_(torch.empty(3, dtype=torch.int64, device="meta")) is real
        assert torch.zeros(3, dtype=torch.int64).copy_(real).tolist() == [0, 1, 2]
    assert real.tolist() == [0, 1, 2]
