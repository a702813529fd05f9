"""AdaLoRA from its paper (arXiv:2303.10512, eq. 3 and 8-12) in float64; imports nothing of ours."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def weight(w: Array, a: Array, e: Array, b: Array, scale: float) -> Array:
    """W + scale P Lambda Q, one triplet after the other."""
    total = w.copy()
    for i in range(len(e)):
        total += scale * e[i] * np.outer(b[:, i], a[i])
    return total


def scores(steps: list[tuple[Array, Array]], beta1: float, beta2: float) -> Array:
    """Score of every entry of one parameter after steps of (value, gradient)."""
    mean = uncertainty = np.zeros_like(steps[0][0])
    for value, gradient in steps:
        now = np.abs(value * gradient)
        mean = beta1 * mean + (1 - beta1) * now
        uncertainty = beta2 * uncertainty + (1 - beta2) * np.abs(now - mean)
    return mean * uncertainty


def triplets(score_a: Array, score_e: Array, score_b: Array) -> Array:
    d, o = score_a.shape[1], score_b.shape[0]
    return np.array([score_e[i] + score_a[i].sum() / d + score_b[:, i].sum() / o for i in range(len(score_e))])


def penalty(factors: list[tuple[Array, Array]]) -> float:
    norms = []
    for a, b in factors:
        norms += [np.sqrt(((a @ a.T - np.eye(len(a))) ** 2).sum()), np.sqrt(((b.T @ b - np.eye(len(a))) ** 2).sum())]
    return float(np.mean(norms))
