"""A model folder as a GGUF file for llama.cpp, with its whole vocabulary: LLaMA, Qwen2 and Qwen3.

The inverse of models/gguf.py, and checked against it. Matrices keep their number type (float32, float16 or bfloat16),
vectors are float32; the names and the layout of q and k are those of convert_hf_to_gguf.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.disk.atomic import replacing
from veneer.disk.tensors import Tensors, open_tensors
from veneer.errors import ConfigError
from veneer.models.gguf import ARCHITECTURES, LAYER, LLAMA3_ROPE, PERMUTED, SIZES, TOP, interleave, llama3_factors
from veneer.models.gguf_tokenizer import CONTROL, USER_DEFINED, rule_of
from veneer.models.skeleton import load_tokenizer

NORMAL, UNUSED = 1, 5
"""llama.cpp's types of tokens, beside CONTROL and USER_DEFINED."""
IN_LAYER = {theirs: ours for ours, theirs in LAYER.items()}
ELSEWHERE = {theirs: ours for ours, theirs in TOP.items()}


def write_gguf_model(folder: Path, file: Path, name: str = "") -> int:
    """Write the model in `folder` as one GGUF file; returns its bytes.

    name    shown by llama.cpp; by default the folder's
    Raises ConfigError for an architecture, a tensor or a tokenizer that is not known here, before anything is written.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (architecture := config["model_type"]) not in ARCHITECTURES or "quantization_config" in config:
        what = "quantized model" if "quantization_config" in config else architecture
        raise ConfigError(
            f"a GGUF model can be written of dense {', '.join(ARCHITECTURES)} models, this is a {what}; use "
            "llama.cpp's own convert_hf_to_gguf.py"
        )
    tensors = open_tensors(folder)
    names = _names(config, tensors)
    with replacing(file) as temporary:
        writer: Any = gguf.GGUFWriter(temporary, architecture)
        writer.add_name(name or folder.name)
        rope = _write_sizes(writer, config)
        _write_vocabulary(writer, load_tokenizer(folder), config)
        _write_tensors(writer, config, tensors, names, rope)
        writer.close()
    return file.stat().st_size


def _names(config: Mapping[str, Any], tensors: Tensors) -> dict[str, str]:
    """Name in the folder -> llama.cpp's; raises ConfigError with all that have none."""
    names, unknown = {}, []
    for name in tensors:
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if layer and layer[2] in IN_LAYER:
            names[name] = f"blk.{layer[1]}.{IN_LAYER[layer[2]]}.{kind}"
        elif stem in ELSEWHERE:
            names[name] = f"{ELSEWHERE[stem]}.{kind}"
        else:
            unknown.append(name)
    if unknown:
        raise ConfigError(f"llama.cpp has no name for {', '.join(unknown[:8])} ({len(unknown)} tensors in all)")
    return names


def _write_sizes(writer: Any, config: Mapping[str, Any]) -> np.ndarray | None:
    """Write what config.json says; returns the divisors of the rotary frequencies, where they have any (LLaMA 3)."""
    architecture = writer.arch
    for ours, theirs in SIZES.items():
        add = writer.add_float32 if isinstance(config[ours], float) else writer.add_uint32
        add(f"{architecture}.{theirs}", config[ours])
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config["vocab_size"])
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_rope_freq_base(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3" and all(rope[key] == value for key, value in LLAMA3_ROPE.items()):
        return llama3_factors(width // 2, theta, float(rope["factor"]))
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind != "default":
        raise ConfigError(f"rope_type {kind!r} cannot be written to GGUF; default, linear and LLaMA 3's can")
    return None


def _write_vocabulary(writer: Any, tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Write every token with its type, the merges, the ids of special tokens and the chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = rule_of(backend)
    if rule is None:
        raise ConfigError(
            f"this tokenizer ({backend['model']['type']}, {json.dumps(backend['pre_tokenizer'])[:200]}) splits text by "
            "no rule that veneer knows llama.cpp's name of; use llama.cpp's own convert_hf_to_gguf.py"
        )
    own = {i: token for token, i in tokenizer.get_vocab().items()}
    if (most := max(own)) >= config["vocab_size"]:
        raise ConfigError(f"token {own[most]!r} has id {most}, but the model has {config['vocab_size']} rows")
    added = tokenizer.added_tokens_decoder
    ids = range(config["vocab_size"])
    kinds = [(CONTROL if added[i].special else USER_DEFINED) if i in added else NORMAL for i in ids]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([own.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([kind if i in own else UNUSED for i, kind in zip(ids, kinds, strict=True)])
    merges = backend["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensors(
    writer: Any, config: Mapping[str, Any], tensors: Tensors, names: Mapping[str, str], rope: np.ndarray | None
) -> None:
    """Write all tensors, one at a time."""
    from gguf import GGMLQuantizationType as Kind

    kinds = {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
    matrices = {}
    for name, theirs in names.items():
        entry = tensors[name]
        half = len(entry.shape) > 1 and entry.dtype in kinds
        matrices[name] = entry.dtype if half else torch.float32
        kind, dtype = (kinds[entry.dtype], np.float16) if half else (Kind.F32, np.float32)
        size = int(np.prod(entry.shape)) * (2 if half else 4)
        writer.add_tensor_info(theirs, entry.shape, np.dtype(dtype), size, kind)
    if rope is not None:
        writer.add_tensor_info("rope_freqs.weight", rope.shape, np.dtype(np.float32), 4 * len(rope), Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    for name in names:
        weight, leaf = tensors.read(name).to(matrices[name]), name.split(".")[-2]
        if writer.arch in PERMUTED and leaf in heads:
            weight = interleave(weight, heads[leaf] or heads["q_proj"])
        writer.write_tensor_data(_bytes(weight))
    if rope is not None:
        writer.write_tensor_data(rope.astype(np.float32))


def _bytes(weight: Tensor) -> np.ndarray:
    """numpy has no bfloat16; the bytes are what is written."""
    plain = weight.contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
