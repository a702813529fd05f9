"""The prompts' registry and what every prompt checks."""

import pytest
import torch

from veneer.errors import ConfigError
from veneer.prompts.base import COMMON, PROMPTS, Shape, some_words

SHAPE = Shape(width=8, layers=2, heads=2, head_width=4, vocab_size=40)


def test_the_registry_lists_what_there_is() -> None:
    assert list(PROMPTS) == ["prefix", "prompt"]
    with pytest.raises(ConfigError, match=r"there is no prompt 'prompts'. Did you mean 'prompt'\?"):
        PROMPTS["prompts"]


def test_words_are_drawn_from_the_frequent_ones() -> None:
    some = some_words(Shape(8, 2, 2, 4, 50_000), 2000, torch.Generator().manual_seed(0))
    assert some.shape == (1, 2000)
    assert COMMON * 0.9 < int(some.max()) < COMMON
    assert int(some_words(SHAPE, 500, torch.Generator().manual_seed(0)).max()) < 40
