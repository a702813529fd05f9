"""DoRA from its paper (arXiv:2402.09353, eq. 5), one row at a time in float64; imports nothing of ours."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def norms(w: Array, a: Array, b: Array, scale: float) -> Array:
    """One length per output: of the row of W + scale B A, over everything that feeds it."""
    return np.array([np.sqrt(sum(v * v for v in (row + scale * (b[o] @ a)).ravel())) for o, row in enumerate(w)])


def weight(w: Array, a: Array, b: Array, scale: float, m: Array) -> Array:
    n = norms(w, a, b, scale)
    return np.array([m[o] / n[o] * (w[o] + scale * (b[o] @ a)) for o in range(len(w))])


def gradients(x: Array, g: Array, w: Array, a: Array, b: Array, scale: float, m: Array) -> tuple[Array, Array, Array]:
    """Of sum(g * y') for a, b, m, with the norm held constant (section 4.3)."""
    n = norms(w, a, b, scale)
    gv = g * (m / n)
    grad_a = scale * (b.T @ gv.T @ x)
    grad_b = scale * (gv.T @ (x @ a.T))
    grad_m = np.array(
        [sum(g[i, o] * (x[i] @ (w[o] + scale * (b[o] @ a))) for i in range(len(x))) for o in range(len(w))]
    )
    return grad_a, grad_b, grad_m / n
