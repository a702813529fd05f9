"""Bytes of tensors without data are counted while they are alive."""

import torch

from veneer.plan.memory_tracker import Ledger

MB = 1 << 20


def meta(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.uint8, device="meta")


def test_counts_what_is_alive_and_the_most_that_was() -> None:
    with Ledger() as ledger:
        a = meta(3 * MB)
        b = meta(2 * MB)
        assert ledger.live == ledger.peak == 5 * MB
        del b
        assert (ledger.live, ledger.mark()) == (3 * MB, 5 * MB)
        assert ledger.peak == 3 * MB
        c = a.view(3, MB)[1]  # the same storage
        assert ledger.live == 3 * MB
        del a, c
        assert ledger.live == 0


def test_what_is_known_is_not_counted() -> None:
    weight = meta(MB)
    with Ledger([weight]) as ledger:
        weight.view(2, -1)
        assert ledger.live == 0


def test_what_autograd_keeps_is_alive_until_the_backward_pass() -> None:
    x = torch.empty(256, 1024, device="meta", requires_grad=True)
    with Ledger([x]) as ledger:
        y = x.exp()  # keeps its result
        z = y.sin().sum()  # keeps its input
        del y
        assert ledger.live == 256 * 1024 * 4 + 4
        z.backward()  # type: ignore[no-untyped-call]
        del z
        assert ledger.live == 256 * 1024 * 4  # the gradient


def test_numbers_that_are_not_there_are_one_and_real_tensors_keep_theirs() -> None:
    with Ledger():
        assert torch.zeros((), device="meta").item() == 1.0
        assert torch.full((), 7).item() == 7


def test_a_copy_of_numbers_that_are_not_there_changes_nothing() -> None:
    real = torch.arange(3)
    with Ledger():
        assert real.copy_(torch.empty(3, dtype=torch.int64, device="meta")) is real
        assert torch.zeros(3, dtype=torch.int64).copy_(real).tolist() == [0, 1, 2]
    assert real.tolist() == [0, 1, 2]
