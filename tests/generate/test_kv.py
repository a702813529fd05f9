"""The roomy cache holds what transformers' own cache holds, after any growth, selection and joining."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, MistralForCausalLM

from veneer.base.base import Base
from veneer.generate.kv import GROWTH, RoomyLayer, expand, is_movable, join, joined_masks, new_cache, select


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def filled(model: Any, rows: int, columns: int, seed: int = 0) -> DynamicCache:
    generator = torch.Generator().manual_seed(seed)
    cache = new_cache(Base.of(model))
    for layer in range(len(cache.layers)):
        cache.update(*(torch.randn(rows, 2, columns, 8, generator=generator) for _ in range(2)), layer)
    return cache


def test_growing_holds_what_torch_cat_holds() -> None:
    ours, theirs = RoomyLayer(), DynamicCache()
    for columns in (5, 1, GROWTH, 1, 3):
        k, v = torch.randn(2, 2, columns, 4), torch.randn(2, 2, columns, 4)
        keys, values = ours.update(k, v)
        expected = theirs.update(k, v, 0)
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_token_moves_nothing_while_there_is_room() -> None:
    layer = RoomyLayer()
    layer.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    before = layer.keys.data_ptr()
    for _ in range(GROWTH):
        layer.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    assert layer.keys.data_ptr() == before
    layer.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    assert layer.keys.data_ptr() != before


def test_select_keeps_rows_and_columns(model: Any) -> None:
    cache = filled(model, 4, 6)
    before = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
    select(cache, torch.tensor([3, 1]), torch.tensor([0, 4, 5]))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[[3, 1]][:, :, [0, 4, 5]])
        assert torch.equal(layer.values, values[[3, 1]][:, :, [0, 4, 5]])


def test_join_aligns_rows_at_their_ends(model: Any) -> None:
    short, long = filled(model, 1, 2, seed=1), filled(model, 2, 5, seed=2)
    both = join([short, long], Base.of(model))
    assert both.get_seq_length() == 5
    for layer, a, b in zip(both.layers, short.layers, long.layers, strict=True):
        assert torch.equal(layer.keys[0, :, 3:], a.keys[0]) and torch.equal(layer.values[1:], b.values)
        assert not layer.keys[0, :, :3].any() and not layer.values[0, :, :3].any()
    masks = joined_masks([torch.tensor([[1, 1]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])])
    assert masks.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_expanded_rows_do_not_write_into_each_other(model: Any) -> None:
    one = filled(model, 1, 4)
    kept = one.layers[0].keys.clone()
    wide = expand(one, Base.of(model), 3, 2)
    new = torch.randn(3, 2, 1, 8)
    keys, _ = wide.layers[0].update(new, new)
    assert torch.equal(keys[:, :, 2:], new) and torch.equal(keys[1, :, :2], kept[0, :, :2])
    assert torch.equal(one.layers[0].keys, kept)


def test_a_sliding_window_is_not_movable(model: Any) -> None:
    assert is_movable(new_cache(Base.of(model)))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=32, sliding_window=4, **shape)
    assert not is_movable(new_cache(Base.of(MistralForCausalLM(config))))
