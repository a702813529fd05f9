"""MoRA's fixed maps against the dense matrices that the paper writes."""

import math

import numpy as np
import pytest
import torch

from tests.methods.layers import rows
from tests.oracles import mora as oracle
from veneer.methods.mora_maps import adjacent_groups, spread_groups, strided_groups, sum_groups, turns

SHAPES = [(12, 4), (13, 5), (7, 7), (9, 6)]
"""Indices and groups, with remainders and without."""


@pytest.mark.parametrize(("n", "side"), SHAPES)
def test_sums_and_copies_are_the_papers_matrices(n: int, side: int) -> None:
    x, z = rows(2, 3, n).double(), rows(2, 3, side).double()
    for strided, c, e in (
        (True, oracle.strided_sum(n, side), oracle.strided_copy(n, side)),
        (False, oracle.adjacent(n, side), oracle.adjacent(n, side).T),
    ):
        assert np.allclose(sum_groups(x, side, strided).numpy(), x.numpy() @ c.T, atol=1e-12)
        assert np.array_equal(spread_groups(z, n, strided).numpy(), z.numpy() @ e.T)


@pytest.mark.parametrize(("n", "side"), SHAPES)
def test_the_group_of_each_index(n: int, side: int) -> None:
    assert strided_groups(n, side).tolist() == oracle.strided_copy(n, side).argmax(1).tolist()
    assert adjacent_groups(n, side).tolist() == oracle.adjacent(n, side).argmax(0).tolist()


def test_angles() -> None:
    cos, sin = turns(6, 4)
    assert cos.shape == sin.shape == (4, 3)
    assert torch.equal(cos[0], torch.ones(3)) and torch.equal(sin[0], torch.zeros(3))
    assert cos[3, 2].item() == pytest.approx(math.cos(3 * 10000 ** (-4 / 6)), abs=1e-7)
    assert sin[2, 1].item() == pytest.approx(math.sin(2 * 10000 ** (-2 / 6)), abs=1e-7)
