"""EVA: LoRA whose A starts from the directions in which the layer's inputs vary most, on some of the training rows.

    y' = y + s B A x        A: the inputs' first R principal directions    B: 0

The ranks are shared out too: of the directions of all layers together those that explain most of their own layer's
variance are kept, as many in all as the settings' ranks add up to.  A layer may get up to `most` times its rank, or
none at all; then it has no delta.  alpha follows the rank, so s stays what the settings say.

Source: Paischer et al. 2024, arXiv:2410.07170, section 3 and algorithm 1; incremental principal directions: Ross et al.
2008, as in the authors' code.
Departs from it: the rows to look at are given, there is no test of convergence; every layer's inputs are looked at by
themselves, also where two layers share them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base import METHODS, Kind, Watch
from veneer.methods.lora import LoRA, LoRAConfig
from veneer.methods.svd import top_svd

ROWS = 2048
"""At most so many rows of one batch are looked at, evenly spread."""
ITERATIONS = 4
"""Of the randomized decomposition of a batch."""


@dataclass(frozen=True, kw_only=True)
class EVAConfig(LoRAConfig):
    """Settings of EVA: those of LoRA but for `init`."""

    method: ClassVar[str] = "eva"
    most: float = 2.0
    """The highest rank a layer may get, as a multiple of its own (no unit), at least 1; 1: all keep theirs."""
    look: int = 8192
    """Tokens of the first training rows that it looks at, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "uniform":
            raise ConfigError(f"eva starts from the layers' inputs, so it has no init, got {self.init!r}")
        if not self.most >= 1:
            raise ConfigError(f"eva.most must be at least 1, got {self.most}")
        if self.look < 1:
            raise ConfigError(f"eva.look must be at least 1, got {self.look}")


class Directions(Watch):
    """The principal directions of all rows seen so far, kept up from batch to batch."""

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

    def explained(self) -> Tensor:
        """The share (R,) of all variance that each direction has, falling."""
        return self.values.square() / self.variance.clamp_min(torch.finfo(torch.float32).tiny)


@METHODS.add("eva")
class EVA(LoRA):
    """The EVA delta of one linear layer: LoRA's, with A from what the layer was seen to be fed."""

    Config = EVAConfig
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})

    @classmethod
    def watch(cls, config: EVAConfig) -> Directions:
        return Directions(round(config.rank * config.most))

    @classmethod
    def looks(cls, config: EVAConfig) -> int:
        return config.look

    @classmethod
    def settle(cls, config: EVAConfig, seen: Mapping[str, Watch]) -> tuple[EVAConfig, dict[str, Directions]]:
        """The settings with every layer's new rank, and what its delta starts from; layers of rank 0 are left out."""
        watches = {path: w for path, w in seen.items() if isinstance(w, Directions)}
        idle = [path for path, w in watches.items() if not w.seen]
        if idle:
            raise ConfigError(f"eva saw no input of {', '.join(idle[:4])} ({len(idle)} in all); look at more rows")
        budget = sum(config.at(path).rank for path in watches)
        ranks = distribute({path: w.explained() for path, w in watches.items()}, budget)
        kept = {path: w for path, w in watches.items() if ranks[path]}
        own = {path: config.at(path) for path in kept}
        alphas = {path: _alpha(own[path], ranks[path]) for path in kept}
        return replace(config, rank_pattern={path: ranks[path] for path in kept}, alpha_pattern=alphas), kept

    @torch.no_grad()
    def begin_(self, start: Watch) -> None:
        assert isinstance(start, Directions)
        self.a.copy_(start.vectors[: len(self.a)])
        self.b.zero_()

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> None:
        """None: a saved EVA adapter is a LoRA adapter."""


def distribute(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many directions each layer keeps of the `budget` that explain most (ties: the earlier layer)."""
    owners = [path for path, shares in explained.items() for _ in shares]
    order = torch.cat(list(explained.values())).argsort(descending=True, stable=True)[:budget].tolist()
    counts = dict.fromkeys(explained, 0)
    for i in order:
        counts[owners[i]] += 1
    return counts


def _alpha(config: LoRAConfig, rank: int) -> float:
    """alpha for another rank that leaves s as it is."""
    more = rank / config.rank
    return config.alpha * (more**0.5 if config.rank_stabilized else more)
