"""MoRA from its paper (arXiv:2405.12130, eq. 3-11), one entry at a time in float64; imports nothing of ours.

Every variant is written as the two dense maps it means; rotation as 2x2 rotations of pairs.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def r_hat(d_in: int, d_out: int, rank: int, even: bool) -> int:
    """The largest or nearest side whose square is about LoRA's rank * (d_in + d_out), rounded half up."""
    exact = math.sqrt((d_in + d_out) * rank)
    side = math.floor(exact) + (1 if exact - math.floor(exact) >= 0.5 else 0)
    return side - 1 if even and side % 2 else side


def strided_sum(n: int, side: int) -> Array:
    """Compression: index j, read on past the end from the start again, adds to group j mod side."""
    c = np.zeros((side, n))
    for j in range(math.ceil(n / side) * side):
        c[j % side, j % n] += 1
    return c


def adjacent(n: int, side: int) -> Array:
    """Membership (side, n) of runs of neighbors, the first n mod side of them one longer."""
    c = np.zeros((side, n))
    j = 0
    for group in range(side):
        for _ in range(n // side + (1 if group < n % side else 0)):
            c[group, j] = 1
            j += 1
    assert j == n
    return c


def strided_copy(n: int, side: int) -> Array:
    """Decompression: output i is a copy of value i mod side."""
    e = np.zeros((n, side))
    for i in range(n):
        e[i, i % side] = 1
    return e


def sharing(m: Array, d_out: int, d_in: int, grouping: int) -> Array:
    side = len(m)
    c = strided_sum(d_in, side) if grouping in (1, 4) else adjacent(d_in, side)
    e = strided_copy(d_out, side) if grouping in (1, 3) else adjacent(d_out, side).T
    return e @ m @ c


def truncation(m: Array, d_out: int, d_in: int) -> Array:
    side = len(m)
    c, e = np.zeros((side, d_in)), np.zeros((d_out, side))
    for i in range(side):
        c[i, i] = e[i, i] = 1
    return e @ m @ c


def rotation_matrix(side: int, position: int) -> Array:
    """Turns the pair (t, t + side / 2) by position * 10000^(-2t / side)."""
    r = np.zeros((side, side))
    half = side // 2
    for t in range(half):
        angle = position * 10000.0 ** (-2 * t / side)
        r[t, t] = r[t + half, t + half] = math.cos(angle)
        r[t, t + half], r[t + half, t] = -math.sin(angle), math.sin(angle)
    return r


def by_pieces(m: Array, d_out: int, d_in: int, rotate: bool) -> Array:
    """Decoupling, or rotation: the update as what it does to each unit input."""
    side = len(m)
    update = np.zeros((d_out, d_in))
    for d in range(d_in):
        unit = np.zeros(d_in)
        unit[d] = 1.0
        results: list[float] = []
        for i in range(math.ceil(d_in / side)):
            piece = np.array([unit[(i * side + c) % d_in] for c in range(side)])
            turned = rotation_matrix(side, i) @ piece if rotate else piece
            results.extend(m @ turned)
        for o in range(d_out):
            update[o, d] = results[o % len(results)]
    return update


def update(variant: str, m: Array, d_out: int, d_in: int, grouping: int = 1) -> Array:
    if variant == "truncation":
        return truncation(m, d_out, d_in)
    if variant == "sharing":
        return sharing(m, d_out, d_in, grouping)
    return by_pieces(m, d_out, d_in, variant == "rotation")
