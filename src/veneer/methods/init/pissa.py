"""PiSSA: LoRA starts from the weight's principal singular values instead of from zero.

    y' = y + s (B A - B0 A0) x        s B0 A0 = the best rank-R approximation of W        A, B start at A0, B0

The paper trains A and B beside a changed base, W - s B0 A0.  Here the base stays as it is and the fixed copies A0, B0
are subtracted, which is the same function.  The adapter is saved as a LoRA of rank 2 R of the unchanged base, [A; A0]
and [B, -B0], which every LoRA reader loads; loaded again it is that LoRA.

Source: Meng et al. 2024, arXiv:2404.02948, eq. 2-5; the form on disk: appendix C there ("to LoRA").
Departs from it: dropout drops A0's inputs too, so that a new delta changes nothing in training mode either.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base import FrozenLayer
from veneer.methods.init.base import INITS, Init, LowRank
from veneer.methods.svd import top_svd


@INITS.add("pissa")
@dataclass(frozen=True, kw_only=True)
class PiSSA(Init):
    """Settings of PiSSA."""

    name: ClassVar[str] = "pissa"
    subtracted: ClassVar[bool] = True
    iterations: int = 0
    """Subspace iterations of a randomized decomposition, 4 to 16 for large layers; 0: the exact one."""

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ConfigError(f"pissa.iterations must be at least 0, got {self.iterations}")

    def refuse_layer(self, layer: FrozenLayer, method: str, rank: int) -> None:
        super().refuse_layer(layer, method, rank)
        narrow = min(layer.in_features, layer.out_features)
        if rank > narrow:
            raise ConfigError(
                f"{method}.rank {rank} is above {narrow}, the most singular values this layer has for init pissa; "
                "lower it (rank_pattern), or exclude the layer"
            )

    def factors(self, delta: LowRank, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return principal(delta.weight(), len(delta.a), delta.scale, self.iterations, rng)


def principal(w: Tensor, rank: int, scale: float, iterations: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (R, D) and B (O, R) of W (O, D) with scale B A its best rank-R approximation, the values shared evenly."""
    u, values, vt = top_svd(w, rank, iterations, rng)
    root = (values / abs(scale)).sqrt()
    return root[:, None] * vt, u * (root if scale > 0 else -root)
