"""(IA)^3 from its paper (arXiv:2205.05638, section 3.3), one output at a time in float64; imports nothing of ours."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def outputs(x: Array, w: Array, bias: Array, factor: Array, on_input: bool) -> Array:
    """x (N, D) -> (N, O): each output, or else each input, times its factor."""
    result = np.zeros((len(x), len(w)))
    for n, row in enumerate(x):
        for o in range(len(w)):
            if on_input:
                result[n, o] = sum(w[o, d] * (factor[d] * row[d]) for d in range(len(row))) + bias[o]
            else:
                result[n, o] = factor[o] * (sum(w[o, d] * row[d] for d in range(len(row))) + bias[o])
    return result
