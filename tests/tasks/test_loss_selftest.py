"""The fast ways of computing the loss are compared with the model's own, and refused where they differ."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
)

from veneer.base.base import Base
from veneer.data.example import Example
from veneer.errors import ModelError
from veneer.models.attention import use_veneer_attention
from veneer.tasks.loss_selftest import TOKENS, check_fast_paths

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)


def made(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    use_veneer_attention(model)
    return model


def examples(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(rng.integers(3, 64, n).astype(np.int32), np.arange(n) > 0, "x", n) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "config",
    [LLAMA, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), GraniteConfig(**SIZES, logits_scaling=7.0)],
    ids=["llama", "gpt2", "granite"],
)
def test_what_is_equal_passes(config: Any, packed: bool, dtype: torch.dtype) -> None:
    check_fast_paths(Base(made(config, dtype)), examples(9, 200, 7), packed=packed)
    check_fast_paths(Base(made(config, dtype)), examples(1), packed=packed)


def test_logits_made_in_an_unknown_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(LLAMA)
    plain = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * 1.02
        return out

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: .* differs .* by 0.02 .*logits in a way not known here"):
        check_fast_paths(Base(model), examples(9, 7), packed=False)


def test_attention_that_is_capped_cannot_be_packed_but_can_be_trained_alone() -> None:
    model = made(Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8))
    with pytest.raises(ModelError, match=r"softcap.*set data.packing to false"):
        check_fast_paths(Base(model), examples(9, 7), packed=True)
    check_fast_paths(Base(model), examples(9, 7), packed=False)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=["bloom", "falcon", "falcon-mamba"],
)
def test_models_that_know_no_documents_are_told_to_train_without_packing(config: Any) -> None:
    model = made(config)
    with pytest.raises(ModelError, match=r"set data.packing to false"):
        check_fast_paths(Base(model), examples(9, 7), packed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_over_tokens_mixes_documents_and_is_seen(dtype: torch.dtype) -> None:
    config = Lfm2Config(
        **SIZES,
        intermediate_size=48,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    model = made(config, dtype)
    with pytest.raises(ModelError, match=r"Lfm2ForCausalLM: the loss computed the fast way.*set data.packing to false"):
        check_fast_paths(Base(model), examples(100, 70), packed=True)
    check_fast_paths(Base(model), examples(100, 70), packed=False)


def test_only_the_beginning_of_long_rows_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = made(LLAMA), []
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(k["input_ids"].shape) or plain(**k))
    check_fast_paths(Base(model), examples(300, 10, 300), packed=True)
    assert seen == [(1, TOKENS), (1, 10)]
