"""Turn a GGUF file into a model folder that transformers loads: weights dequantized, names and layouts translated.

LLaMA, Qwen2 and Qwen3 files are read here, tensor by tensor. llama.cpp stores the q and k projections of LLaMA files
with the rotary halves interleaved; this is undone (convert_hf_to_gguf.py, `LlamaModel.permute`). Every other
architecture goes through transformers' own GGUF reader, which holds the whole model in memory.

Dequantized matrices are written as bfloat16. This changes the loss of SmolLM2-135M in Q4_1 by 0.0001 nats a token
(3.3361 to 3.3362 on 4,095 tokens; benchmarks/gguf_rounding.py); float32 would take twice the disk. Matrices stored as
float32 or float16 keep their dtype, and vectors (norms, biases) stay float32.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.disk.atomic import write_json
from veneer.disk.tensors import Spec, write_model_tensors
from veneer.errors import ModelError, VeneerError
from veneer.models.gguf_tokenizer import write_tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PERMUTED = {"llama"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config.json, weights, tokenizer and generation_config.json of `file` into the existing `folder`.

    Raises ModelError if the file is not GGUF, is truncated, or has an unsupported architecture.
    """
    reader = _open(file)
    architecture = field(reader, "general.architecture")
    if architecture not in ARCHITECTURES or any("_exps" in t.name for t in reader.tensors):
        _through_transformers(file, folder, architecture)
        return
    names = _translated(file, reader)
    config = _config(file, reader, architecture, names)
    specs = {names[t.name]: _spec(t) for t in reader.tensors if t.name in names}
    write_model_tensors(folder, specs, _weights(reader, names, config, architecture in PERMUTED))
    write_json(folder / "config.json", config)
    stops = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(folder / "generation_config.json", stops)
    write_tokenizer(file, reader, folder)


def field(reader: Any, key: str, default: Any = None) -> Any:
    """The value of a metadata key of a gguf.GGUFReader, as plain Python."""
    found = reader.fields.get(key)
    return default if found is None else found.contents()


def _open(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        if field(reader, "general.architecture") is None:
            raise ModelError(f"{file} has no metadata general.architecture, so it is not a model")
    except VeneerError:
        raise
    except Exception as error:  # the reader raises errors of many types
        raise ModelError(f"{file} is not a complete GGUF file: {error}. Fetch it again.") from error
    return reader


def _translated(file: Path, reader: Any) -> dict[str, str]:
    """GGUF tensor name -> transformers' name; raises ModelError listing the names it does not know."""
    names, unknown = {}, []
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue  # read by _rope
        stem, _, kind = tensor.name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer and layer[2] in LAYER:
            names[tensor.name] = f"model.layers.{layer[1]}.{LAYER[layer[2]]}.{kind}"
        elif stem in TOP:
            names[tensor.name] = f"{TOP[stem]}.{kind}"
        else:
            unknown.append(tensor.name)
    if unknown:
        raise ModelError(f"{file}: {len(unknown)} tensors with unknown names: {', '.join(unknown[:8])}")
    return names


def _config(file: Path, reader: Any, architecture: str, names: dict[str, str]) -> dict[str, Any]:
    """config.json as transformers writes it."""
    found = {key: field(reader, f"{architecture}.{gguf_key}") for key, gguf_key in SIZES.items()}
    found = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in found.items()}
    if missing := [f"{architecture}.{SIZES[key]}" for key, value in found.items() if value is None]:
        raise ModelError(f"{file} lacks the metadata {', '.join(missing)}; fetch it again")
    heads = found["num_attention_heads"]
    has = set(names.values()).__contains__
    bias = has("model.layers.0.self_attn.q_proj.bias")
    theta = field(reader, f"{architecture}.rope.freq_base", 10000.0)
    head = field(reader, f"{architecture}.attention.key_length") or field(
        reader, f"{architecture}.rope.dimension_count"
    )
    config = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture, **found}
    config |= {
        "num_key_value_heads": field(reader, f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head or found["hidden_size"] // heads,
        "vocab_size": next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"),
        "tie_word_embeddings": not has("lm_head.weight"),
        "rope_parameters": {"rope_theta": theta, **_rope(file, reader, architecture, theta)},
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    if architecture != "qwen2":
        config["attention_bias"] = bias
    for key, gguf_key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if (token := field(reader, f"tokenizer.ggml.{gguf_key}_token_id")) is not None:
            config[f"{key}_token_id"] = token
    return config


def _rope(file: Path, reader: Any, architecture: str, theta: float) -> dict[str, Any]:
    """Scaling of the rotary frequencies: none, linear, or LLaMA 3's (recognized from its stored factors)."""
    factors = next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    kind = field(reader, f"{architecture}.rope.scaling.type", "none")
    if factors is not None:
        factor = float(factors.max())
        if np.abs(llama3_factors(len(factors), theta, factor) - factors).max() > 1e-3 * factor:
            raise ModelError(f"{file}: its rope_freqs are not LLaMA 3's; other factors are not supported")
        return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    if kind == "linear":
        return {"rope_type": "linear", "factor": field(reader, f"{architecture}.rope.scaling.factor")}
    if kind != "none":
        raise ModelError(f"{file}: rope scaling {kind!r} is not supported; known are none, linear and LLaMA 3's")
    return {"rope_type": "default"}


def llama3_factors(n: int, theta: float, factor: float) -> np.ndarray:
    """The divisors of n rotary frequencies in LLaMA 3 (transformers' `_compute_llama3_parameters`)."""
    low, high, context = LLAMA3_ROPE.values()
    wavelength = 2 * np.pi * theta ** (np.arange(n) / n)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _spec(tensor: Any) -> Spec:
    from gguf import GGMLQuantizationType as Kind

    kept = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.F64: torch.float64}
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return (torch.float32 if len(shape) == 1 else kept.get(tensor.tensor_type, torch.bfloat16)), shape


def _weights(
    reader: Any, names: dict[str, str], config: dict[str, Any], permuted: bool
) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        if tensor.name not in names:
            continue
        dtype, shape = _spec(tensor)
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).reshape(shape)
        stem = tensor.name.split(".")[-2]
        if permuted and stem in ("attn_q", "attn_k"):
            key = "num_attention_heads" if stem == "attn_q" else "num_key_value_heads"
            weight = deinterleave(weight, config[key])
        yield names[tensor.name], weight.to(dtype)


def deinterleave(weight: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from (pair, half) to (half, pair).  weight (O, D) or (O,); O = heads * head_dim."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Undo `deinterleave`: reorder each head's rows from (half, pair) to (pair, half)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def _through_transformers(file: Path, folder: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except (ValueError, KeyError, ImportError, NotImplementedError, OSError) as error:
        raise ModelError(
            f"{file}: its architecture {architecture!r} is read neither by veneer ({', '.join(ARCHITECTURES)}) nor by "
            f"transformers: {error}\nGive the model's safetensors folder or hub id instead."
        ) from error
