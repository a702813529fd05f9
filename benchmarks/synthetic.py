"""Made LLaMA models of any size, written straight as 4-bit folders, a layer at a time; and rows to train them on.

Codes are random, as those of normally distributed weights are; absmax give W the spread of a fresh model's weights,
so that activations keep their size through all layers. The folder is what `veneer quantize` writes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.base.quant_cache import quantization_config
from veneer.disk.tensors import write_model_tensors
from veneer.kernels.dynamic_quant import dynamic_map
from veneer.kernels.reference import Packed
from veneer.storage.fourbit import NESTED_BLOCK
from veneer.storage.nf4 import NF4

BLOCK = 64
CODES = (1, 2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 10, 10, 11, 13, 14)
"""Equally likely: 16 quantiles of a normal distribution in NF4, their mean nearly 0 (all 16 codes' is not: a mean makes
every output alike)."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA without grouped heads."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab_size: int = 32_000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """O and D of a layer's linear layers."""
        d, f = self.hidden, self.ffn
        attention = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
        return {**attention, "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}

    @property
    def weights(self) -> int:
        """Numbers in all linear layers of all blocks."""
        return self.layers * sum(o * d for o, d in self.linears.values())

    @property
    def quantized_bytes(self) -> int:
        """Of the blocks: codes, absmax, and absmax of absmax."""
        return int(self.weights * (0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK)))

    @property
    def dense_bytes(self) -> int:
        """Of embedding, head and norms, in bfloat16."""
        return 2 * (2 * self.vocab_size * self.hidden + (2 * self.layers + 1) * self.hidden)

    def adapter_parameters(self, rank: int) -> int:
        """Of LoRA on all linear layers."""
        return self.layers * sum(rank * (o + d) for o, d in self.linears.values())


SHAPES = {"33b": Shape(60, 6656, 17920, 52), "65b": Shape(80, 8192, 22016, 64)}


def write_model(
    folder: Path, shape: Shape, say: Callable[[str], None] = lambda _: None, *, quantized: bool = True
) -> None:
    """A folder that loads as any other, in NF4 or in bfloat16; memory is one layer."""
    folder.mkdir(parents=True)
    _write_tokenizer(folder, shape.vocab_size)
    one = _weight((BLOCK, BLOCK), 0.02, None)
    config = _config(shape)
    if quantized:
        config["quantization_config"] = quantization_config(one, ["lm_head"], config)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    specs = {}
    for layer in range(shape.layers):
        for name, tensor in _layer(shape, layer, None, quantized):
            specs[name] = (tensor.dtype, tuple(tensor.shape))
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (shape.vocab_size, shape.hidden))
    ends |= {"model.norm.weight": (shape.hidden,)}
    specs |= {name: (torch.bfloat16, size) for name, size in ends.items()}
    write_model_tensors(folder, specs, _tensors(shape, ends, say, quantized))


def write_rows(file: Path, rows: int, tokens: int, vocab_size: int) -> None:
    """Running text of `tokens` tokens a row, with the one that ends it."""
    rng = np.random.default_rng(1)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            text = " ".join(f"w{i}" for i in rng.integers(3, vocab_size, tokens - 1))
            out.write(json.dumps({"text": text}) + "\n")


def _tensors(
    shape: Shape, ends: dict[str, tuple[int, ...]], say: Callable[[str], None], quantized: bool
) -> Iterator[tuple[str, Tensor]]:
    rng = np.random.default_rng(0)
    for layer in range(shape.layers):
        yield from _layer(shape, layer, rng, quantized)
        if layer % 10 == 9:
            say(f"layer {layer + 1} of {shape.layers} written")
    generator = torch.Generator().manual_seed(0)
    for name, size in ends.items():
        normal = torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        yield name, torch.ones_like(normal) if "norm" in name else normal


def _layer(shape: Shape, layer: int, rng: np.random.Generator | None, quantized: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a layer; without `rng` on the meta device."""
    prefix = f"model.layers.{layer}"
    for name, (o, d) in shape.linears.items():
        deep = math.sqrt(2 * shape.layers) if name.endswith(("o_proj", "down_proj")) else 1.0
        kept = _weight((o, d), 1 / math.sqrt(d) / deep, rng)
        if quantized:
            yield from kept.tensors(f"{prefix}.{name}.weight").items()
        else:
            empty = torch.empty((o, d), dtype=torch.bfloat16, device="meta")
            yield f"{prefix}.{name}.weight", empty if rng is None else kept.dense(torch.bfloat16)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)


def _weight(size: tuple[int, int], spread: float, rng: np.random.Generator | None) -> NF4:
    """W (O, D) of this standard deviation, its absmax within about a tenth of their mean."""
    n = size[0] * size[1]
    blocks = n // BLOCK
    levels = NF4.tables()[0]
    absmax = spread / float(levels[list(CODES)].square().mean().sqrt())
    pairs = np.array([16 * first + second for first in CODES for second in CODES], dtype=np.uint8)

    def random(count: int, among: np.ndarray[Any, Any] | None = None) -> Tensor:
        if rng is None:
            return torch.empty(count, dtype=torch.uint8, device="meta")
        drawn = rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64).view(np.uint8)[:count]
        return torch.from_numpy(drawn if among is None else among[drawn])

    nested = torch.full((-(-blocks // NESTED_BLOCK),), 0.1 * absmax)
    packed = Packed(
        random(n // 2, pairs), random(blocks), levels, nested, dynamic_map().levels, absmax, NESTED_BLOCK, BLOCK
    )
    return NF4(packed, size, torch.bfloat16)


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "bfloat16",
    }


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word a token: <unk>, <s>, </s>, then w3, w4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
