"""Parameters and gradients as views of flat buffers."""

import pytest
import torch
from torch import nn

from veneer.errors import TrainingError
from veneer.train.optim.flat_params import ALIGN, Flat, accumulator


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(300)), nn.Parameter(torch.randn(256))]


def test_values_stay_and_move_with_the_buffer() -> None:
    before, ours = parameters(), parameters()
    flat = Flat(ours)
    assert flat.starts == [0, ALIGN, 3 * ALIGN, 4 * ALIGN]
    assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))
    flat.values += 1
    assert all(torch.equal(a + 1, b) for a, b in zip(before, ours, strict=True))
    assert flat.spans([1, 2]) == [range(ALIGN), range(ALIGN, 4 * ALIGN)]


def test_gradients_of_several_passes_add_up_in_the_buffer() -> None:
    theirs, ours = parameters(), parameters()
    flat = Flat(ours)
    for _ in range(2):  # two steps of three micro-batches
        for group in (theirs, ours):
            for p in group:
                p.grad = None
            for k in range(3):
                sum(((p * (k + 1.5)).sin().sum() for p in group), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        for a, b, view in zip(theirs, ours, flat.views(flat.gradients), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.equal(a.grad, b.grad) and b.grad.data_ptr() == view.data_ptr()
    between = torch.ones(flat.size, dtype=torch.bool)
    for view in flat.views(between):
        view.fill_(False)
    assert not flat.gradients[between].any() and not flat.values[between].any()


def test_gradients_given_by_hand_are_taken() -> None:
    ours = parameters()
    flat = Flat(ours)
    for p in ours:
        p.grad = torch.full_like(p, 2.0)
    assert flat.gather().sum() == 2 * (15 + 300 + 256)


def test_a_parameter_without_a_gradient_is_an_error() -> None:
    ours = parameters()
    flat = Flat(ours)
    ours[0].grad = torch.zeros(3, 5)
    with pytest.raises(TrainingError, match="2 of 3 parameters have no gradient"):
        flat.gather()


def test_other_number_types_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"float32, got torch.float64"):
        Flat([nn.Parameter(torch.zeros(2, dtype=torch.float64))])


def test_without_gradients_each_is_as_the_buffer_would_have_it() -> None:
    ours, with_gradients = parameters(), Flat(parameters())
    flat = Flat(ours, gradients=False)
    assert flat.gradients.numel() == 0 and torch.equal(flat.values, with_gradients.values)
    for index, (p, kept) in enumerate(zip(ours, with_gradients.parameters, strict=True)):
        gradient = torch.randn(p.shape)
        kept.grad = gradient.clone()
        with_gradients._take(index, kept)
        assert torch.equal(flat.padded(index, gradient), with_gradients.gradients[flat.place(index)])


@pytest.mark.parametrize("gradients", [True, False])
def test_gradients_arrive_at_the_same_nodes_in_every_pass(gradients: bool) -> None:
    alone, ours = parameters(), parameters()
    flat = Flat(ours, gradients=gradients)
    for p in [*alone, *ours]:
        accumulator(p).metadata["pass"] = 1
    assert not any(accumulator(p).metadata for p in alone)
    assert all(accumulator(p).metadata == {"pass": 1} for p in flat.parameters)
