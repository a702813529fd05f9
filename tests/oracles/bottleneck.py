"""A bottleneck adapter, one number at a time in float64 (arXiv:1902.00751, section 2.1); imports nothing of ours."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def activate(name: str, v: float) -> float:
    if name == "relu":
        return max(v, 0.0)
    if name == "gelu":
        return v * 0.5 * (1 + math.erf(v / math.sqrt(2)))
    return v / (1 + math.exp(-v)) if name == "silu" else math.tanh(v)


def change(h: Array, down: Array, down_bias: Array, up: Array, up_bias: Array, name: str, scale: float) -> Array:
    """What is added to the output for one vector h."""
    z = [
        activate(name, sum(d * v for d, v in zip(row, h, strict=True)) + b)
        for row, b in zip(down, down_bias, strict=True)
    ]
    return np.array(
        [scale * (sum(u * v for u, v in zip(row, z, strict=True)) + b) for row, b in zip(up, up_bias, strict=True)]
    )
