"""Which blocks gradients pass through, and what stands for them in a few."""

import re

import pytest

from veneer.plan.target_blocks import Places

BLOCKS = ["model.layers.0", "model.layers.1", "model.layers.10"]


@pytest.mark.parametrize(
    ("chosen", "changed", "inside", "outside", "first"),
    [
        (["model.layers.10.mlp.up"], {2}, ("mlp.up",), (), 2),
        (["model.layers.1.q", "model.layers.10.q", "model.layers.10.v"], {1, 2}, ("q", "v"), (), 1),
        (["model.layers.1"], {1}, ("",), (), 1),
        (["lm_head"], set(), (), ("lm_head",), 3),
        (["model.layers.10.q", "lm_head"], {2}, ("q",), ("lm_head",), 2),
        (["model.embed_tokens", "model.layers.10.q"], {2}, ("q",), ("model.embed_tokens",), 0),
        ([], set(), (), (), 3),
    ],
)
def test_gradients_end_at_the_first_block_that_is_changed(
    chosen: list[str], changed: set[int], inside: tuple[str], outside: tuple[str], first: int
) -> None:
    found = Places.of(BLOCKS, chosen, "lm_head", prompt=False)
    assert found == Places(3, frozenset(changed), inside, outside, first)
    assert Places.of(BLOCKS, chosen, "lm_head", prompt=True).first == 0


def test_other_blocks_are_changed_alike() -> None:
    places = Places.of(BLOCKS, ["model.layers.10.q", "lm_head"], "lm_head", prompt=False)
    targets = places.in_(BLOCKS[:2]).targets
    assert isinstance(targets, str)
    others = ["model.layers.0.q", "model.layers.1.q", "lm_head", "model.layers.10.q", "model.layers.0.v"]
    assert [p for p in others if re.fullmatch(targets, p)] == ["model.layers.0.q", "model.layers.1.q", "lm_head"]
    whole = Places.of(BLOCKS, ["model.layers.1"], None, prompt=False)
    assert whole.in_(BLOCKS[:1]).targets == re.escape(BLOCKS[0])
