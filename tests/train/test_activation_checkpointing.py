"""Recomputed activations: the same gradients, and the model as it was afterwards."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from veneer import machine
from veneer.adapters.attach import attach
from veneer.base.base import Base
from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.errors import ConfigError, ModelError
from veneer.methods.base import config_from
from veneer.models.attention import use_veneer_attention
from veneer.tasks.lm_loss import backward, hidden_states
from veneer.train.activation_checkpointing import TRIMMED, Wanted, chosen_blocks, recomputing

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.3,
)
OPT = OPTConfig(
    vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
    dropout=0.5, init_std=0.3,
)  # fmt: skip


def gradients(config: Any, wanted: Wanted, packed: bool) -> tuple[list[Tensor], Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    use_veneer_attention(model)
    adapter = attach(model, config_from("lora", {"rank": 2, "init": "random", "dropout": 0.3}))
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(3, 64, n).astype(np.int32), np.arange(n) > 1, "x", 1) for n in (12, 5, 9)]
    batch = collate(examples if packed else examples[:1])
    torch.manual_seed(1)
    with recomputing(Base(model), wanted):
        backward(Base(model), hidden_states(Base(model), batch, packed=packed), batch.targets, 5)
    return [p.grad for p in adapter.parameters()], model


@pytest.mark.parametrize("wanted", [True, 2, (2,), [1, 0]], ids=str)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt: its blocks have dropout of their own"])
def test_gradients_are_equal_with_dropout_on(config: Any, packed: bool, wanted: Wanted) -> None:
    plain, _ = gradients(config, False, packed)
    again, _ = gradients(config, wanted, packed)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.count_nonzero(g) for g in plain)


def test_freed_memory_is_given_back_every_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 2 * TRIMMED + 1}))
    given_back: list[int] = []
    ran: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    monkeypatch.setattr(machine, "trim_memory", lambda: given_back.append(len(ran)))
    with recomputing(Base(model), True):
        model.model(torch.arange(4)[None])
    assert given_back == [TRIMMED - 1, 2 * TRIMMED - 1]


def llama() -> Any:
    return AutoModelForCausalLM.from_config(LLAMA)


def test_a_count_means_the_first_blocks_and_a_list_those_numbers() -> None:
    model = llama()
    layers = list(model.model.layers)
    assert chosen_blocks(Base(model), False) == []
    assert chosen_blocks(Base(model), True) == layers
    assert chosen_blocks(Base(model), 2) == layers[:2]
    assert chosen_blocks(Base(model), [2, 0, 2]) == [layers[0], layers[2]]


@pytest.mark.parametrize(("wanted", "absent"), [(4, "3"), ([0, 7], "7"), ([-1], "-1")], ids=str)
def test_blocks_that_are_not_there_are_named(wanted: Wanted, absent: str) -> None:
    with pytest.raises(ConfigError, match=rf"has 3 blocks, 0 to 2; there is no block {absent}$"):
        chosen_blocks(Base(llama()), wanted)


def test_activations_of_blocks_are_not_kept() -> None:
    kept = []
    for wanted in (False, 1, 2, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            gradients(LLAMA, wanted, True)
        kept.append(sum(sizes))
    assert kept == sorted(set(kept), reverse=True)
    assert kept[-1] < 0.2 * kept[0]  # what is saved inside a block never reaches the graph


def test_the_model_is_as_it_was() -> None:
    _, model = gradients(LLAMA, True, True)
    assert not any(m.training for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(RuntimeError, match="stop"), recomputing(Base(model), True):
        assert any("forward" in vars(m) for m in model.modules())
        raise RuntimeError("stop")
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_model_without_blocks_is_refused() -> None:
    with (
        pytest.raises(ModelError, match=r"Linear has no blocks.*set train.recompute to false"),
        recomputing(Base(nn.Linear(2, 2)), True),
    ):
        pass
    with recomputing(Base(nn.Linear(2, 2)), False):
        pass
