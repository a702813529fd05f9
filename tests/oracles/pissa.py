"""PiSSA from its paper (arXiv:2404.02948, eq. 2-5) in float64 NumPy; imports nothing of ours."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def residual(w: Array, rank: int) -> Array:
    """What the paper keeps as its base: W without its largest singular values."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return np.asarray(sum((s[i] * np.outer(u[:, i], vt[i]) for i in range(rank, len(s))), np.zeros_like(w)))


def weight(w: Array, a: Array, b: Array, scale: float) -> Array:
    """The trained weight: the residual base and its LoRA."""
    return residual(w, len(a)) + scale * (b @ a)
