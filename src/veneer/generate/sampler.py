"""Choosing the next token from logits: greedily, or by chance with a stream of its own for each row.

Because every row draws from its own seeded stream, what a row says does not depend on which rows it was batched with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.base.device import Device
from veneer.errors import ConfigError

Sampler = Callable[[Tensor, Sequence[int]], Tensor]
"""Logits (B, V) and the rows' numbers in the caller's order -> chosen tokens (B,) int64."""


def greedy(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """The likeliest token of each row; the first of several equally likely."""
    return logits.argmax(-1)


@dataclass
class Sampling:
    """Draw from softmax(logits / temperature), cut to the likeliest `top_k` and to the nucleus of mass `top_p`.

    Source of the nucleus: Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    Raises ConfigError for settings out of range.
    """

    temperature: float = 1.0
    """Above 0; below 1 sharpens."""
    top_p: float = 1.0
    """The smallest set of tokens with at least this probability is kept, in (0, 1]."""
    top_k: int = 0
    """Only so many tokens are kept; 0 for all."""
    seed: int = 0
    _streams: dict[int, torch.Generator] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        problems = []
        if not self.temperature > 0:
            problems.append(f"temperature must be above 0, got {self.temperature} (for greedy text leave it out)")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            problems.append(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if problems:
            raise ConfigError("; ".join(problems))

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """One draw per row: the kept probabilities, likeliest first, cut where a uniform number falls."""
        p = torch.softmax(logits.float() / self.temperature, -1)
        kept, tokens = self._likeliest(p)
        if self.top_p < 1:
            before = kept.cumsum(-1) - kept
            kept = kept.masked_fill(before >= self.top_p, 0)
        sums = kept.to(Device(kept.device).wide_dtype).cumsum(-1)
        u = torch.tensor([self._uniform(row) for row in rows], dtype=sums.dtype, device=sums.device)
        choice = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)
        last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding may not push a draw past the last kept token
        choice = choice.minimum(last) if tokens is not None else choice.clamp(max=p.shape[-1] - 1)
        return (choice if tokens is None else tokens.gather(-1, choice)).squeeze(-1)

    def _likeliest(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities in falling order with their tokens, as many as can be kept; (p, None) when all are kept.

        A full sort of the vocabulary costs more than the model's step, so few tokens are tried first.
        """
        vocab_size = p.shape[-1]
        if self.top_k:
            kept, tokens = p.topk(min(self.top_k, vocab_size))
            return kept / kept.sum(-1, keepdim=True), tokens
        if self.top_p == 1:
            return p, None
        count = min(64, vocab_size)
        while True:
            kept, tokens = p.topk(count)
            if count == vocab_size or bool((kept.sum(-1) >= self.top_p).all()):
                return kept, tokens
            count = min(8 * count, vocab_size)

    def _uniform(self, row: int) -> float:
        if row not in self._streams:
            self._streams[row] = torch.Generator().manual_seed((self.seed * 1_000_003 + row) % 2**63)
        return float(torch.rand((), dtype=torch.float64, generator=self._streams[row]))
