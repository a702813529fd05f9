"""The blocks of a model, in order."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from veneer.models.blocks import blocks_of


def test_blocks_by_path_in_order() -> None:
    llama = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2)
    gpt2 = GPT2Config(vocab_size=8, n_embd=8, n_layer=3, n_head=2)
    with torch.device("meta"):
        assert list(blocks_of(AutoModelForCausalLM.from_config(llama))) == [f"model.layers.{i}" for i in range(12)]
        assert list(blocks_of(AutoModelForCausalLM.from_config(gpt2))) == [f"transformer.h.{i}" for i in range(3)]
    assert blocks_of(nn.Linear(2, 2)) == {}
