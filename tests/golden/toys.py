"""Tiny models whose weights come from a formula, so that they are the same under every version of every library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def fill_(model: nn.Module) -> nn.Module:
    """Give every parameter values in [-1, 1] scaled to its width, from a sine that no random generator enters."""
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (1.7 + 0.1 * n) + n)
            parameter.copy_(wave.reshape(parameter.shape) * 1.5 / max(parameter.shape[-1], 4) ** 0.5)
    return model.float().eval()


def llama(**changes: Any) -> nn.Module:
    """A LLaMA of 3 layers, hidden 16, 24 words, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    return fill_(LlamaForCausalLM(LlamaConfig(**(shape | changes))))


def untied_llama() -> nn.Module:
    return llama(tie_word_embeddings=False)


def gpt2() -> nn.Module:
    """A GPT-2 of 2 layers, width 16, 24 words: its linear layers are Conv1D, its head a Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return fill_(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)))


class Convolutions(nn.Module):
    """(B, 4, T) -> (B, 3): one- and two-dimensional convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.plane = nn.Conv2d(2, 4, (3, 2), padding=(1, 1), bias=False)
        self.point = nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.tanh(self.line(x)))
        x = self.point(torch.tanh(self.plane(x.reshape(len(x), 2, 4, -1))))
        y: Tensor = self.head(x.mean((-1, -2)))
        return y


def convolutions() -> nn.Module:
    return fill_(Convolutions())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "untied llama": untied_llama,
    "gpt2": gpt2,
    "convolutions": convolutions,
}


def inputs(model: str) -> Tensor:
    """What the model is shown: token ids (2, 9), or (2, 4, 10) numbers."""
    if model == "convolutions":
        return torch.cos(torch.arange(80.0) * 0.9).reshape(2, 4, 10)
    return (torch.arange(18) * 7 % 24).reshape(2, 9)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, or what the convolutions give."""
    y = model(x)
    out: Tensor = y if isinstance(y, Tensor) else y.logits
    return out


ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ATTENTION, "r": 2, "lora_alpha": 6}),
    "rslora": ("llama", {"target_modules": ["o_proj", "down_proj"], "r": 3, "lora_alpha": 4, "use_rslora": True}),
    "all-linear": ("untied llama", {"target_modules": "all-linear", "r": 1, "lora_dropout": 0.1}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"], "r": 2, "lora_alpha": 4,
            "rank_pattern": {"k_proj": 1, r"layers\.[12]\.self_attn\.q_proj": 3, "^model.layers.0.self_attn.q_proj": 4},
            "alpha_pattern": {"v_proj": 7, "layers.0.self_attn.k_proj": 2.5},
        },
    ),
    "layers": ("llama", {"target_modules": ATTENTION, "r": 2, "layers_to_transform": [0, 2]}),
    "layers by list": (
        "llama",
        {"target_modules": ATTENTION, "r": 2, "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "exclude": ("llama", {"target_modules": ["q_proj", "up_proj"], "r": 2, "exclude_modules": ["1.mlp.up_proj"]}),
    "exclude by expression": ("llama", {"target_modules": ["q_proj"], "r": 2, "exclude_modules": r".*\.0\..*"}),
    "expression": ("llama", {"target_modules": r".*\.(0|2)\.(self_attn\.k|mlp\.gate)_proj", "r": 2}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 2}),
    "tied embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "r": 2}),
    "untied head": ("untied llama", {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "use_rslora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 2, "fan_in_fan_out": True}),
    "gpt2 and a linear head": ("gpt2", {"target_modules": ["c_fc", "lm_head", "wte"], "r": 2}),
    "convolutions": ("convolutions", {"target_modules": ["line", "grouped", "plane", "point", "head"], "r": 2}),
}  # fmt: skip
"""Name -> model and peft.LoraConfig: what is stored in this folder as peft wrote it, and tried live as well."""
