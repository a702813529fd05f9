"""The largest singular values, held to NumPy's."""

import numpy as np
import pytest
import torch

from tests.methods.layers import rows
from veneer.methods.svd import top_svd


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (5, 5)])
@pytest.mark.parametrize("iterations", [0, 12])
def test_the_best_approximation_of_its_rank(shape: tuple[int, int], iterations: int) -> None:
    w = rows(*shape)
    u, values, vt = top_svd(w, 4, iterations, torch.Generator().manual_seed(0))
    all_values = np.linalg.svd(w.numpy().astype(float), compute_uv=False)
    assert np.abs(values.numpy() / all_values[:4] - 1).max() < 1e-3
    lost = np.linalg.norm(w.numpy() - ((u * values) @ vt).numpy())
    assert lost == pytest.approx(np.sqrt((all_values[4:] ** 2).sum()), rel=1e-3)
    assert torch.allclose(u.T @ u, torch.eye(4), atol=1e-5)
    assert torch.allclose(vt @ vt.T, torch.eye(4), atol=1e-5)


def test_no_more_values_than_there_are_and_the_same_seed_is_the_same_answer() -> None:
    w = rows(3, 7)
    assert top_svd(w, 5, 2, torch.Generator())[1].shape == (3,)
    one, same = (top_svd(rows(40, 50), 3, 1, torch.Generator().manual_seed(4))[2] for _ in range(2))
    assert torch.equal(one, same)
