"""Prompt tuning: a table of embeddings; on models it is tested in adapters/test_prompted.py."""

import pytest
import torch

from tests.prompts.test_base import SHAPE
from veneer.errors import AdapterMismatch, ConfigError
from veneer.prompts.prompt import PromptTuning, PromptTuningConfig

EMBEDDINGS = torch.arange(320.0).reshape(40, 8)


def made(seed: int = 0) -> PromptTuning:
    rng = torch.Generator().manual_seed(seed)
    return PromptTuning(SHAPE, PromptTuningConfig(tokens=3), rng, lambda ids: EMBEDDINGS[ids], lambda x: [(x, x)])


def test_it_starts_as_words_and_gives_the_model_its_embeddings() -> None:
    prompt = made()
    assert all(bool((row == EMBEDDINGS).all(1).any()) for row in prompt.embeddings)
    assert torch.equal(prompt.embeddings, made().embeddings)
    assert not torch.equal(prompt.embeddings, made(seed=1).embeddings)
    ((keys, _),) = prompt.keys_values(lambda x: [(x, x)])
    assert torch.equal(keys, prompt.embeddings[None])
    assert (
        sum(p.numel() for p in prompt.parameters()) == PromptTuning.n_params(SHAPE, PromptTuningConfig(tokens=3)) == 24
    )


def test_settings_and_tensors_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.tokens must be at least 1, got -2"):
        PromptTuningConfig(tokens=-2)
    with pytest.raises(AdapterMismatch, match=r"adapter has \(2, 8\), model needs \(3, 8\)"):
        made().load_(torch.zeros(2, 8))
    with pytest.raises(AdapterMismatch, match="infinite or not a number"):
        made().load_(torch.full((3, 8), float("nan")))
    fields = PromptTuning.to_peft(SHAPE, PromptTuningConfig(tokens=3))
    assert PromptTuning.from_peft(fields) == PromptTuningConfig(tokens=3)
    assert PromptTuning.from_peft({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}) is None
