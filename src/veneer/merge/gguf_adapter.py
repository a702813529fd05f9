"""A LoRA adapter as a GGUF file that llama.cpp puts on a base model (`llama-cli --lora FILE`).

The base keeps its own file, quantized or not. Names are those of llama.cpp's convert_lora_to_gguf.py: per target two
float32 matrices, `blk.N.attn_q.weight.lora_a` (R, D) and `.lora_b` (O, R), and `adapter.lora.alpha` for all. llama.cpp
keeps the q and k projections of LLaMA models with the rotary halves interleaved, so the rows of their B are too.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.disk.atomic import replacing
from veneer.errors import ConfigError, listed
from veneer.methods.lora import LoRAConfig
from veneer.models.gguf import ARCHITECTURES, LAYER, PERMUTED, TOP, interleave

LINEAR = {theirs: ours for ours, theirs in LAYER.items() if "norm" not in ours}


def write_gguf_adapter(adapter: Adapter, file: Path) -> int:
    """Write a plain LoRA adapter of one rank and alpha (as `as_lora` makes it); returns the file's bytes.

    Raises ConfigError for a model or a target that llama.cpp names in a way not known here, all targets at once.
    """
    if others := [part.kind for part in adapter.parts if not part.deltas]:
        raise ConfigError(
            f"a LoRA file for llama.cpp cannot hold {' and '.join(others)}; merge the adapter into its model and "
            "write that as GGUF (`veneer export --to gguf-model` does both)"
        )
    config, base = adapter.settings, adapter.base
    assert isinstance(config, LoRAConfig) and not config.rank_pattern and not config.alpha_pattern
    if base.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"--to gguf knows the names of {', '.join(ARCHITECTURES)} models, this is a {base.architecture}; export "
            "--to lora and use llama.cpp's own convert_lora_to_gguf.py on it"
        )
    names = {path: gguf_name(path, tied=base.tied) for path in adapter.deltas}
    if unknown := [path for path, name in names.items() if name is None]:
        raise ConfigError(
            f"--to gguf cannot say {listed(unknown, 4, ', ')}: llama.cpp has no such layer, or "
            "ties it to another; train without them (method.exclude)"
        )
    heads = {"q_proj": base.attention_heads, "k_proj": base.key_value_heads}
    permuted = base.architecture in PERMUTED
    tensors: dict[str, Tensor] = {}
    for path, delta in adapter.deltas.items():
        a, b = delta.tensors()["lora_A.weight"].detach(), delta.tensors()["lora_B.weight"].detach()
        leaf = path.rpartition(".")[2]
        tensors[f"{names[path]}.lora_a"] = a
        tensors[f"{names[path]}.lora_b"] = interleave(b, heads[leaf]) if permuted and leaf in heads else b
    with replacing(file) as temporary:
        _write(temporary, base.architecture, config.alpha, tensors)
    return file.stat().st_size


def gguf_name(path: str, *, tied: bool = False) -> str | None:
    """llama.cpp's name of the weight of a linear layer; None where it has none, and for a head tied to embeddings."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    if layer:
        return f"blk.{layer[1]}.{LINEAR[layer[2]]}.weight" if layer[2] in LINEAR else None
    return "output.weight" if path == TOP["output"] and not tied else None


def _write(file: Path, architecture: str, alpha: float, tensors: dict[str, Tensor]) -> None:
    import gguf

    writer: Any = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.cpu().float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
