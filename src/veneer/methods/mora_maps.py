"""The fixed maps of MoRA: which inputs and outputs share a row of M, and by what angles pieces are turned.

Source: Jiang et al. 2024, arXiv:2405.12130, eq. 6-11; index for index those of the authors' code.
"""

from math import ceil

import torch
from torch import Tensor


def strided_groups(n: int, side: int) -> Tensor:
    """The group of each of n indices: j mod R'."""
    return torch.arange(n) % side


def adjacent_groups(n: int, side: int) -> Tensor:
    """The group of each of n indices: runs of neighbors, of n // R' indices, the first n mod R' one longer."""
    short, longer = divmod(n, side)
    return torch.repeat_interleave(torch.arange(side), torch.tensor([short + 1] * longer + [short] * (side - longer)))


def sum_groups(x: Tensor, side: int, strided: bool) -> Tensor:
    """C x: x (..., D) -> (..., R'), each the sum of one group's inputs."""
    if strided:
        return continued(x, side).reshape(*x.shape[:-1], -1, side).sum(dim=-2)
    short, longer = divmod(x.shape[-1], side)
    head, tail = x[..., : longer * (short + 1)], x[..., longer * (short + 1) :]
    sums = [head.reshape(*x.shape[:-1], longer, short + 1).sum(dim=-1)] if longer else []
    return torch.cat([*sums, tail.reshape(*x.shape[:-1], side - longer, short).sum(dim=-1)], dim=-1)


def spread_groups(z: Tensor, o: int, strided: bool) -> Tensor:
    """E z: z (..., R') -> (..., O), each output its group's value."""
    side = z.shape[-1]
    if strided:
        return tiled(z, o)
    short, longer = divmod(o, side)
    head, tail = z[..., :longer], z[..., longer:]
    return torch.cat([head.repeat_interleave(short + 1, dim=-1), tail.repeat_interleave(short, dim=-1)], dim=-1)


def continued(x: Tensor, side: int) -> Tensor:
    """x (..., D) with its own first entries again at the end, up to a multiple of R'."""
    again = -x.shape[-1] % side
    return torch.cat([x, x[..., :again]], dim=-1) if again else x


def tiled(z: Tensor, o: int) -> Tensor:
    """z (..., n) again and again up to (..., O)."""
    times = ceil(o / z.shape[-1])
    return (z if times == 1 else z.repeat(*[1] * (z.dim() - 1), times))[..., :o]


def turns(side: int, pieces: int) -> tuple[Tensor, Tensor]:
    """cos and sin of i * 10000^(-2t / R'), each (pieces, R' / 2) float32."""
    step = 10000 ** (-torch.arange(0, side - 1, 2).double() / side)
    angles = torch.outer(torch.arange(pieces).double(), step)
    return angles.cos().float(), angles.sin().float()
