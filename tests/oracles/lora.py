"""LoRA from its paper, slowly, in float64; imports nothing of ours.

arXiv:2106.09685, eq. 3; rank-stabilized scale of arXiv:2312.03732.
"""

from itertools import product
from math import sqrt

import numpy as np

PAD_MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def scale(alpha, rank, rank_stabilized=False):
    return alpha / (sqrt(rank) if rank_stabilized else rank)


def linear(x, w, bias, a, b, s):
    """x (N, D), w (O, D), a (R, D), b (O, R) -> (N, O), one dot product at a time."""
    return np.array(
        [
            [
                sum(w[o, d] * row[d] for d in range(len(row)))
                + bias[o]
                + s * sum(b[o, r] * sum(a[r, d] * row[d] for d in range(len(row))) for r in range(len(a)))
                for o in range(len(w))
            ]
            for row in x
        ]
    )


def embedding(ids, table, a, b, s):
    """ids (N,), table (V, O), a (R, V), b (O, R) -> (N, O): a one-hot input picks a column of A."""
    return np.array(
        [[table[i, o] + s * sum(b[o, r] * a[r, i] for r in range(len(a))) for o in range(table.shape[1])] for i in ids]
    )


def conv_update(a, b, s, groups=1):
    """a (R, D / groups, *kernel), b (O, R / groups) -> the change of the weight, (O, D / groups, *kernel)."""
    out = np.zeros((len(b), *a.shape[1:]))
    rows, outs = len(a) // groups, len(b) // groups
    for o in range(len(b)):
        for r in range(rows):
            out[o] += s * b[o, r] * a[o // outs * rows + r]
    return out


def conv(x, w, bias, stride, padding, dilation, groups=1, mode="zeros"):
    """x (D, *space), w (O, D / groups, *kernel), padding [(left, right), ...] -> (O, *space'), one sum at a time."""
    x = np.pad(x, [(0, 0), *padding], mode=PAD_MODES[mode])
    kernel = w.shape[2:]
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[1:], kernel, stride, dilation, strict=True)]
    out = np.zeros((len(w), *size))
    ins, outs = w.shape[1], len(w) // groups
    for o in range(len(w)):
        for at in product(*map(range, size)):
            total = bias[o]
            for i in range(ins):
                for k in product(*map(range, kernel)):
                    place = tuple(p * s + j * d for p, s, j, d in zip(at, stride, k, dilation, strict=True))
                    total += w[(o, i, *k)] * x[(o // outs * ins + i, *place)]
            out[(o, *at)] = total
    return out
