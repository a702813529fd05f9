"""EVA: LoRA's A starts from the directions in which the layer's inputs vary most, on some of the training rows.

    y' = y + s B A x        A: the inputs' first R principal directions    B: 0

The ranks are shared out too: of all layers' directions, those that explain most of their own layer's variance are kept,
as many in all as the settings' ranks add up to.  A layer may get up to `most` times its rank, or none at all; then it
has no delta.  alpha follows the rank, so s stays as set.  After a restart A is drawn uniformly.

Source: Paischer et al. 2024, arXiv:2410.07170, section 3 and algorithm 1; incremental principal directions: Ross et al.
2008, as in the authors' code.
Departs from it: the number of rows is given, there is no test of convergence; every layer's inputs are seen separately,
also where two layers share them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base import DataInit, Kind, Watch
from veneer.methods.init.base import INITS
from veneer.methods.init.uniform import Uniform
from veneer.methods.svd import top_svd

ROWS = 2048
"""Most rows of one batch that are used, evenly spread."""
ITERATIONS = 4
"""Subspace iterations of a batch's randomized decomposition."""


class Directions(Watch):
    """The principal directions of all rows seen so far, updated with every batch."""

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self.mean, self.variance = torch.zeros(()), torch.zeros(())
        self.values, self.vectors = torch.zeros(0), torch.zeros(0, 0)
        self._rng = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take in x (..., D)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rows[:: max(1, -(-len(rows) // ROWS))]
        n, mean = len(rows), rows.mean(0)
        stack = [rows - mean]
        total = self.seen + n
        if self.seen:
            correction = (self.seen * n / total) ** 0.5 * (self.mean - mean)
            stack = [self.values[:, None] * self.vectors, *stack, correction[None]]
        both = torch.cat(stack)
        _, self.values, self.vectors = top_svd(both, self.most, ITERATIONS, self._rng)
        self.variance = self.variance + stack[-1].square().sum() + (stack[1].square().sum() if self.seen else 0)
        self.mean = self.mean + (mean - self.mean) * (n / total)
        self.seen = total

    @torch.no_grad()
    def begin_(self, delta: Any) -> None:
        delta.a.copy_(self.vectors[: len(delta.a)])
        delta.b.zero_()

    def explained(self) -> Tensor:
        """Each direction's share (R,) of the variance, falling."""
        return self.values.square() / self.variance.clamp_min(torch.finfo(torch.float32).tiny)


@INITS.add("eva")
@dataclass(frozen=True, kw_only=True)
class EVA(Uniform, DataInit):
    """Settings of EVA."""

    name: ClassVar[str] = "eva"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    drawn: ClassVar[bool] = False
    most: float = 2.0
    """The highest rank a layer may get, as a multiple of its own (no unit), at least 1; 1: all keep theirs."""
    look: int = 8192
    """Tokens of the first training rows to look at, at least 1."""

    def __post_init__(self) -> None:
        if not self.most >= 1:
            raise ConfigError(f"eva.most must be at least 1, got {self.most}")
        if self.look < 1:
            raise ConfigError(f"eva.look must be at least 1, got {self.look}")

    def watch(self, config: Any) -> Directions:
        return Directions(round(config.rank * self.most))

    def settle(self, config: Any, seen: Mapping[str, Watch]) -> tuple[Any, dict[str, Directions]]:
        """The settings with every layer's new rank, and the watches of the layers whose rank is not 0."""
        watches = {path: w for path, w in seen.items() if isinstance(w, Directions)}
        idle = [path for path, w in watches.items() if not w.seen]
        if idle:
            raise ConfigError(
                f"{config.method}.init eva saw no input of {', '.join(idle[:4])} ({len(idle)} in all); "
                "look at more rows"
            )
        budget = sum(config.at(path).rank for path in watches)
        ranks = distribute({path: w.explained() for path, w in watches.items()}, budget)
        kept = {path: w for path, w in watches.items() if ranks[path]}
        alphas = {path: _alpha(config.at(path), ranks[path]) for path in kept}
        return replace(config, rank_pattern={path: ranks[path] for path in kept}, alpha_pattern=alphas), kept


def distribute(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Number of directions that each layer keeps, of the `budget` that explain most (ties: the earlier layer)."""
    owners = [path for path, shares in explained.items() for _ in shares]
    order = torch.cat(list(explained.values())).argsort(descending=True, stable=True)[:budget].tolist()
    counts = dict.fromkeys(explained, 0)
    for i in order:
        counts[owners[i]] += 1
    return counts


def _alpha(config: Any, rank: int) -> float:
    """The alpha that keeps s at another rank."""
    more = rank / config.rank
    alpha: float = config.alpha * (more**0.5 if config.rank_stabilized else more)
    return alpha
