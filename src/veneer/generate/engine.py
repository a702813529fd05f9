"""Text from prompts: batched generation with a key-value cache, rows leaving and joining as they end.

The longest prompts start; when a quarter of a batch has ended, those rows' places go to waiting prompts, or the batch
shrinks. What all prompts begin with is computed once. Padding stands on the left, positions are counted per row, and
only the last position's logits are computed, so that a row's text is the one it would get alone, up to the rounding of
sums in another order.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from veneer.base.base import Base
from veneer.errors import ConfigError, DataError, ModelError, listed
from veneer.generate.kv import expand, is_movable, join, joined_masks, new_cache, select
from veneer.generate.sampler import Sampler, greedy
from veneer.generate.stop import stop_ids as find_stop_ids

PREFILL_TOKENS = 2048
"""Prompt tokens computed at once, padding included; a longer prompt goes alone.  Bounds memory."""
SHARED_AT_LEAST = 8
"""Tokens that prompts must have in common for these to be computed once."""

OnToken = Callable[[int, int], bool | None]
"""Told a row and its new token; returning True ends that row after it."""
OnFinish = Callable[[int, list[int]], object]
"""Told a row and all its new tokens when it has ended."""


@dataclass
class Memory:
    """Keys and values of the last conversation, so that the next turn computes only what is new.

    Valid for one model with one set of adapters: `clear` it when an adapter is attached or detached.
    """

    tokens: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None

    def clear(self) -> None:
        """Forget everything."""
        self.tokens, self.cache = [], None


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | None = None,
    sampler: Sampler = greedy,
    batch_size: int = 32,
    on_token: OnToken | None = None,
    on_finish: OnFinish | None = None,
    memory: Memory | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, in the prompts' order, without the stop token that ended them.

    base            a causal language model, with or without adapters attached
    max_new_tokens  at most so many per prompt, fewer where the model's positions end
    stop_ids        tokens that end a row; None: those of the tokenizer, the model and the chat template
    batch_size      B, rows computed together
    memory          for a single prompt: what it begins with is taken from here, and the whole row is left here

    The model's training mode is left as it was.  Raises DataError for an empty or too long prompt (all at once),
    ConfigError for a count below 1, ModelError for a model that is no causal language model.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if memory is not None and len(prompts) != 1:
        raise ConfigError(f"memory holds one conversation, got {len(prompts)} prompts")
    asked = [list(p) for p in prompts]
    limit = _check(base, asked)
    if not asked:
        return []
    ends = frozenset(find_stop_ids(base) if stop_ids is None else stop_ids)
    run = _Run(base, asked, max_new_tokens, ends, sampler, batch_size, limit)
    run.on_token, run.on_finish = on_token, on_finish
    with base.evaluating(), torch.inference_mode():
        run.begin(memory)
        while run.waiting or run.batch is not None:
            run.step()
        run.remember(memory)
    return run.outputs


def _check(base: Base, prompts: list[list[int]]) -> int | None:
    """The number of positions the model has, None for any; raises for what cannot be generated from."""
    if base.is_encoder_decoder or not base.accepts("past_key_values"):
        raise ModelError(f"{base.kind} cannot generate here: a causal language model with past_key_values is needed")
    limit = base.max_positions
    problems = [f"prompt {i} is empty" for i, p in enumerate(prompts) if not p]
    if limit is not None:
        long = [(i, len(p)) for i, p in enumerate(prompts) if len(p) >= limit]
        problems += [f"prompt {i} has {n} tokens, the model has {limit} positions" for i, n in long]
    if problems:
        shown = listed(problems, 10, "; ")
        raise DataError(f"{shown}. Give each prompt at least one token and leave room for the answer.")
    return limit


@dataclass
class _Batch:
    """Rows under way.  A row that has ended stays, computed in vain, until the batch is next rebuilt."""

    rows: list[int]
    cache: DynamicCache
    mask: Tensor
    """(B, columns) int64, 1 where the cache holds a token of the row."""
    positions: Tensor
    """(B, 1) the position of the token to be computed next."""
    tokens: Tensor
    """(B, 1) that token."""
    alive: list[bool]


class _Run:
    """One call of `generate`."""

    on_token: OnToken | None = None
    on_finish: OnFinish | None = None
    last: _Batch | None = None
    """The batch that ended last."""

    def __init__(
        self,
        base: Base,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        sampler: Sampler,
        batch_size: int,
        limit: int | None,
    ) -> None:
        self.base, self.prompts, self.stop_ids = base, prompts, stop_ids
        self.sampler, self.batch_size = sampler, batch_size
        self.room = [min(max_new_tokens, (limit or len(p) + max_new_tokens) - len(p)) for p in prompts]
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.batch: _Batch | None = None
        self.prefix: DynamicCache | None = None
        self.shared = 0
        self.device = base.device.torch_device
        self.movable = is_movable(new_cache(base))

    def begin(self, memory: Memory | None) -> None:
        """Find what the prompts begin with: in the memory, or by computing it once for all."""
        if not self.movable:
            return
        first, last = min(self.prompts), max(self.prompts)  # all others lie between these two
        own = min(map(len, self.prompts)) - 1
        if memory is not None:
            self.shared = min(_common(memory.tokens, first), own)
            self.prefix = memory.cache
            memory.clear()  # the model is about to write into it; `remember` fills it again
        elif len(self.prompts) > 1 and (common := min(_common(first, last), own)) >= SHARED_AT_LEAST:
            self.prefix = new_cache(self.base)
            ids = torch.tensor([first[:common]], device=self.device)
            self._forward(ids, torch.ones_like(ids), torch.arange(common, device=self.device)[None], self.prefix)
            self.shared = common

    def step(self) -> None:
        """Bring the batch up to strength if places are free, then compute one token for each of its rows."""
        if self.batch is None or self._worth_rebuilding(self.batch):
            self._rebuild()
        if (batch := self.batch) is None:
            return
        batch.mask = nn.functional.pad(batch.mask, (0, 1), value=1)
        logits = self._forward(batch.tokens, batch.mask, batch.positions, batch.cache)
        batch.positions = batch.positions + 1
        self._take(batch, logits)

    def remember(self, memory: Memory | None) -> None:
        """Leave the single row's keys and values to the next call."""
        if memory is not None and self.movable and self.last is not None:
            fed = int(self.last.mask.sum())
            columns = self.last.mask[0].nonzero().squeeze(1)
            select(self.last.cache, torch.zeros_like(columns[:1]), columns)
            memory.tokens = [*self.prompts[0], *self.outputs[0]][:fed]
            memory.cache = self.last.cache

    def _worth_rebuilding(self, batch: _Batch) -> bool:
        free = self.batch_size - sum(batch.alive)
        gain = free if self.waiting else batch.alive.count(False)
        return self.movable and 4 * gain >= len(batch.alive)

    def _rebuild(self) -> None:
        """Let ended rows go and waiting ones in."""
        old = self.batch
        if old is not None:
            self._compact(old)
        free = self.batch_size - (len(old.rows) if old is not None else 0)
        parts = [old] if old is not None else []
        while free and self.waiting:
            rows = self._next_rows(free)
            free -= len(rows)
            part = self._prefill(rows)
            if any(part.alive):
                parts.append(part)
            if not self.movable:
                break
        self.batch = None
        if len(parts) == 1:
            self.batch = parts[0]
        elif parts:
            self.batch = _Batch(
                rows=[r for p in parts for r in p.rows],
                cache=join([p.cache for p in parts], self.base),
                mask=joined_masks([p.mask for p in parts]),
                positions=torch.cat([p.positions for p in parts]),
                tokens=torch.cat([p.tokens for p in parts]),
                alive=[a for p in parts for a in p.alive],
            )

    def _next_rows(self, free: int) -> list[int]:
        """Take waiting rows, longest first, as many as there are places for and as fit one computation."""
        width = len(self.prompts[self.waiting[0]]) - self.shared
        count = max(1, min(free, PREFILL_TOKENS // width))
        rows, self.waiting = self.waiting[:count], self.waiting[count:]
        return rows

    def _prefill(self, rows: list[int]) -> _Batch:
        """Compute the prompts of `rows` and choose each one's first token."""
        prompts = [self.prompts[r][self.shared :] for r in rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        mask = nn.functional.pad(mask, (self.shared, 0), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.prefix is not None and self.shared:
            cache = expand(self.prefix, self.base, len(rows), self.shared)
        else:
            cache = new_cache(self.base)
        logits = self._forward(ids, mask, positions[:, self.shared :], cache)
        batch = _Batch(rows, cache, mask, positions[:, -1:] + 1, ids[:, -1:], [True] * len(rows))
        self._take(batch, logits)
        return batch

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (B, V) of the last column."""
        optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        extra = {k: v for k, v in optional.items() if self.base.accepts(k)}
        result = self.base.network(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        logits: Tensor = result.logits[:, -1]
        return logits

    def _take(self, batch: _Batch, logits: Tensor) -> None:
        """Choose the living rows' next tokens, tell the caller, and note which rows have ended."""
        living = [i for i, alive in enumerate(batch.alive) if alive]
        rows = [batch.rows[i] for i in living]
        chosen = self.sampler(logits if len(living) == len(batch.rows) else logits[living], rows)
        batch.tokens[living, 0] = chosen
        for i, row, token in zip(living, rows, chosen.tolist(), strict=True):
            ended = token in self.stop_ids
            if not ended:
                self.outputs[row].append(token)
                ended = len(self.outputs[row]) >= self.room[row]
                if self.on_token is not None and self.on_token(row, token):
                    ended = True
            if ended:
                batch.alive[i] = False
                if self.on_finish is not None:
                    self.on_finish(row, self.outputs[row])
        if not any(batch.alive):
            self.last, self.batch = batch, None

    def _compact(self, batch: _Batch) -> None:
        """Drop ended rows, and columns that no living row needs."""
        if all(batch.alive):
            return
        keep = torch.tensor([i for i, alive in enumerate(batch.alive) if alive], device=self.device)
        mask = batch.mask[keep]
        columns = mask.any(0).nonzero().squeeze(1)
        select(batch.cache, keep, columns)
        batch.mask, batch.positions, batch.tokens = mask[:, columns], batch.positions[keep], batch.tokens[keep]
        batch.rows = [r for r, alive in zip(batch.rows, batch.alive, strict=True) if alive]
        batch.alive = [True] * len(batch.rows)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
