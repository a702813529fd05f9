"""4-bit and 8-bit blockwise quantization from the papers, slowly, in NumPy; imports nothing of ours.

NF4 and FP4: arXiv:2305.14314; dynamic 8-bit map: arXiv:2110.02861. float32 where the format is defined by it.
"""

from statistics import NormalDist

import numpy as np


def nf4_levels():
    """QLoRA, section 3: 8 levels up, 7 down, 0, scaled to [-1, 1]; 0.9677083 is the authors' edge."""
    edge, q = 0.9677083, NormalDist().inv_cdf
    up = [q(edge + (0.5 - edge) * i / 8) for i in range(8)]
    down = [-q(edge + (0.5 - edge) * i / 7) for i in range(7)]
    return [v / up[0] for v in sorted([*up, *down, 0.0])]


def fp4_levels():
    """By code: sign, then 0, 1/16, 8, 12, 4, 6, 2, 3 twelfths."""
    magnitudes = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
    return [sign * m / 12 for sign in (1, -1) for m in magnitudes]


def dynamic_map():
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        for mean in (edges[:-1] + edges[1:]) / 2:
            values += [mean * 10.0 ** (i - 6), -mean * 10.0 ** (i - 6)]
    return sorted(values)


def absmax(flat, block):
    return [max(abs(v) for v in flat[i : i + block]) for i in range(0, len(flat), block)]


def nearest(v, levels):
    """Code of the level next to v; between two equally near ones the lower level, between two zeros code 0."""
    order = sorted(range(len(levels)), key=lambda c: (levels[c], c))
    return min(order, key=lambda c: abs(levels[c] - v))


def unpack(codes, n):
    """Bytes -> nibbles, the high one first."""
    return [c for byte in codes for c in (byte >> 4, byte & 15)][:n]


def dequantize(codes, scales, levels, block, n):
    """One float32 product per weight."""
    levels, scales = np.float32(levels), np.float32(scales)
    return np.array([levels[c] * scales[i // block] for i, c in enumerate(unpack(codes, n))], dtype=np.float32)


def decode_absmax(codes, nested, levels, offset, block):
    levels, nested = np.float32(levels), np.float32(nested)
    return np.array(
        [levels[c] * nested[i // block] + np.float32(offset) for i, c in enumerate(codes)], dtype=np.float32
    )


def matmul(x, w):
    """y (N, O) = x (N, D) w (O, D)^T in float64, one dot product at a time."""
    x, w = np.float64(x), np.float64(w)
    return np.array([[sum(row * weights) for weights in w] for row in x])
