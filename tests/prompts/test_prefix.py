"""Prefix tuning: how one table holds every layer's keys and values; on models: adapters/test_prompted.py."""

import torch

from tests.prompts.test_base import SHAPE
from veneer.prompts.base import KeysValues
from veneer.prompts.prefix import PrefixTuning, PrefixTuningConfig

CONFIG = PrefixTuningConfig(tokens=3)


def pairs() -> KeysValues:
    """Distinct numbers for 2 layers, 2 heads, 3 tokens, 4 wide."""
    numbers = torch.arange(96.0).reshape(2, 2, 1, 2, 3, 4)
    return [(layer[0], layer[1]) for layer in numbers]


def test_the_table_is_what_the_model_makes_of_words() -> None:
    prompt = PrefixTuning(SHAPE, CONFIG, torch.Generator(), lambda ids: torch.zeros(1, 3, 8), lambda x: pairs())
    for (keys, values), (k, v) in zip(prompt.keys_values(lambda x: []), pairs(), strict=True):
        assert torch.equal(keys, k)
        assert torch.equal(values, v)
    assert sum(p.numel() for p in prompt.parameters()) == PrefixTuning.n_params(SHAPE, CONFIG) == 96


def test_the_tables_order_is_pefts() -> None:
    """Token, then keys and values of layer 0, of layer 1, each head after head."""
    prompt = PrefixTuning(SHAPE, CONFIG, torch.Generator(), lambda ids: torch.zeros(1, 3, 8), lambda x: pairs())
    token = prompt.table()[1].reshape(2, 2, 2, 4)
    for layer, pair in enumerate(pairs()):
        for which in (0, 1):
            for head in (0, 1):
                assert torch.equal(token[layer, which, head], pair[which][0, head, 1])


def test_settings_come_back() -> None:
    fields = PrefixTuning.to_peft(SHAPE, CONFIG)
    assert (fields["token_dim"], fields["num_attention_heads"]) == (8, 2)
    assert PrefixTuning.from_peft(fields) == CONFIG
    assert PrefixTuning.from_peft({"peft_type": "LORA"}) is None
