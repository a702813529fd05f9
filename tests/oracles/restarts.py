"""ReLoRA and ReMoRA on one linear layer, from their papers, in NumPy and float64; imports nothing of ours.

ReLoRA, arXiv:2307.05695, algorithm 1; ReMoRA, arXiv:2405.12130, section 4.4; AdamW, arXiv:1711.05101, algorithm 2.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class LowRank:
    """W + s B A, from the A that a cycle was started with and B = 0."""

    a: np.ndarray
    outputs: int
    s: float

    def start(self):
        return [self.a.copy(), np.zeros((self.outputs, len(self.a)))]

    def change(self, p):
        return self.s * p[1] @ p[0]

    def gradient(self, p, g):
        return [self.s * p[1].T @ g, self.s * g @ p[0].T]


@dataclass
class Square:
    """W + E M C, from M = 0."""

    c: np.ndarray
    e: np.ndarray

    def start(self):
        return [np.zeros((len(self.c), len(self.c)))]

    def change(self, p):
        return self.e @ p[0] @ self.c

    def gradient(self, p, g):
        return [self.e.T @ g @ self.c.T]


def jagged_cosine(t, steps, warmup, restarts, rewarm, floor):
    """The share of the learning rate at step t, from 0: a cosine, and lines up to it at the start and at restarts."""

    def cosine(u):
        return floor + (1 - floor) * (1 + math.cos(math.pi * (u - warmup) / (steps - warmup))) / 2

    if t < warmup:
        return (t + 1) / warmup
    for r in restarts:
        if r <= t < r + rewarm:
            return (t - r + 1) / rewarm * cosine(min(r + rewarm, steps - 1))
    return cosine(t)


def pruned(first, how, keep):
    """Which entries of a parameter's moments a restart leaves, as 0 and 1."""
    if how == "zero":
        return np.zeros_like(first)
    if how == "none":
        return np.ones_like(first)
    order = np.argsort(-np.abs(first), axis=None)
    mask = np.zeros(first.size)
    mask[order[: max(1, round(keep * first.size))]] = 1
    return mask.reshape(first.shape)


def run(w, rows, cycles, restarts, rate, lr, beta1, beta2, eps, decay, reset, keep):
    """Losses before each step and weights, all folded in, after it.

    rows        x (N, D), y (N, O) of each step; the loss is the sum of squares over N
    cycles      for each cycle what is trained in it
    restarts    steps done before each cycle but the first
    rate        share of lr at each step
    """
    w = w.copy()
    cycle = cycles[0]
    p = cycle.start()
    m, v = [np.zeros_like(q) for q in p], [np.zeros_like(q) for q in p]
    losses, weights = [], []
    for t, (x, y) in enumerate(rows):
        if t in restarts:
            w += cycle.change(p)
            cycle = cycles[restarts.index(t) + 1]
            p = cycle.start()
            for i, first in enumerate(m):
                left = pruned(first, reset, keep)
                m[i], v[i] = m[i] * left, v[i] * left
        error = x @ (w + cycle.change(p)).T - y
        losses.append(float((error**2).sum() / len(x)))
        for i, g in enumerate(cycle.gradient(p, 2 / len(x) * error.T @ x)):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            first, second = m[i] / (1 - beta1 ** (t + 1)), v[i] / (1 - beta2 ** (t + 1))
            p[i] = p[i] - lr * rate(t) * (first / (np.sqrt(second) + eps) + decay * p[i])
        weights.append(w + cycle.change(p))
    return losses, weights
