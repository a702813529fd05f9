"""Weights of many shapes for the tests of storages."""

import torch
from torch import Tensor

SHAPES = [(8, 64), (48, 576), (5, 96), (3, 7), (1, 1), (33, 50), (257, 64), (64, 4096)]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[0, : shape[1] // 2] = 0
    return w.to(dtype)
