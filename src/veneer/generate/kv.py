"""The keys and values of a batch under way: written in place as it grows, and movable when rows leave or join.

Every row of a batch is aligned at its end. A column is one slot of the cache; the batch's mask says which columns hold
a token of which row, and positions are counted per row, so padding may stand anywhere before a row's tokens.
Shapes: keys and values (B, heads, columns, width of a head).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from veneer.base.base import Base

GROWTH = 64
"""Columns of room made at a time; a step that finds room copies nothing but its own token."""


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values as the filled part of larger buffers.

    transformers' own layer joins old and new with `torch.cat`, which copies the whole cache at every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new columns and return all of them; both (B, heads, columns, width)."""
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._buffers is None or new > self._buffers[0].shape[-2]:
            keys, values = (s.new_empty(*s.shape[:2], new + GROWTH, s.shape[-1]) for s in (key_states, value_states))
            if old:
                keys[:, :, :old], values[:, :, :old] = self.keys, self.values
            self._buffers = (keys, values)
        self._buffers[0][:, :, old:new] = key_states
        self._buffers[1][:, :, old:new] = value_states
        self.hold(*self._buffers, new)
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """Hold the first `columns` of these buffers, instead of what was held; the rest is room."""
        self._buffers = (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :columns], values[:, :, :columns]


def new_cache(base: Base) -> DynamicCache:
    """An empty cache: roomy where attention keeps all, transformers' own layers for sliding windows and others."""
    cache = DynamicCache(config=base.network.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_movable(cache: DynamicCache) -> bool:
    """Whether rows may leave and join, and a common beginning be shared: when every layer keeps every column."""
    return bool(cache.layers) and all(type(layer) is RoomyLayer for layer in cache.layers)


def _layers(cache: DynamicCache) -> list[RoomyLayer]:
    return cast(list[RoomyLayer], cache.layers)


def select(cache: DynamicCache, rows: Tensor, columns: Tensor) -> None:
    """Keep only `rows` (int64) and `columns` (int64) of a movable cache."""
    for layer in _layers(cache):
        keys, values = (t.index_select(0, rows).index_select(2, columns) for t in (layer.keys, layer.values))
        layer.hold(keys, values, len(columns))


def expand(cache: DynamicCache, base: Base, rows: int, columns: int) -> DynamicCache:
    """The first `columns` of a movable cache of one row, repeated for `rows` rows; nothing is copied yet."""
    wide = new_cache(base)
    for layer, held in zip(_layers(wide), _layers(cache), strict=True):
        keys, values = (t[:, :, :columns].expand(rows, -1, -1, -1) for t in (held.keys, held.values))
        layer.hold(keys, values, columns)
    return wide


def join(caches: Sequence[DynamicCache], base: Base) -> DynamicCache:
    """All rows of movable caches in one, padded on the left to the longest and with room to grow."""
    joined = new_cache(base)
    columns = max(c.get_seq_length() for c in caches)
    for index, layer in enumerate(_layers(joined)):
        parts = [_layers(c)[index] for c in caches]
        layer.hold(_stacked([p.keys for p in parts], columns), _stacked([p.values for p in parts], columns), columns)
    return joined


def _stacked(parts: list[Tensor], columns: int) -> Tensor:
    """(B_i, heads, columns_i, width) each -> (sum of B_i, heads, columns + GROWTH, width).

    Each part ends at `columns`; zeros stand before it, because attention multiplies them by 0.
    """
    rows, first = sum(p.shape[0] for p in parts), parts[0]
    out = first.new_empty(rows, first.shape[1], columns + GROWTH, first.shape[3])
    start = 0
    for part in parts:
        end = start + part.shape[0]
        out[start:end, :, : columns - part.shape[2]] = 0
        out[start:end, :, columns - part.shape[2] : columns] = part
        start = end
    return out


def joined_masks(masks: Sequence[Tensor]) -> Tensor:
    """Masks (B_i, columns_i) of caches to be joined -> (sum of B_i, columns), zeros before."""
    columns = max(m.shape[1] for m in masks)
    return torch.cat([nn.functional.pad(m, (columns - m.shape[1], 0)) for m in masks])
