"""A LoRA adapter for llama.cpp: its names and layout, read back by the gguf library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from tests.methods.layers import moved
from tests.methods.parity import fresh
from tests.models.conftest import gguf_name as expected_name
from tests.models.conftest import permute
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.errors import ConfigError
from veneer.merge.export import as_lora
from veneer.merge.gguf_adapter import gguf_name, write_gguf_adapter
from veneer.methods.base import config_from


def trained(model: Any, method: str = "lora", targets: Any = "all-linear", **settings: Any) -> Adapter:
    adapter = attach(model, config_from(method, settings), targets).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.1, seed=n)
    return adapter


def test_names_layout_and_metadata(tiny_model: Path, tmp_path: Path) -> None:
    """As convert_lora_to_gguf.py writes it: the gguf library reads shapes reversed, q and k rows are interleaved."""
    adapter = as_lora(trained(fresh(tiny_model), rank=3, alpha=6.0)).adapter
    assert write_gguf_adapter(adapter, tmp_path / "a.gguf") == (tmp_path / "a.gguf").stat().st_size
    reader = GGUFReader(tmp_path / "a.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 3.0,
    }
    found = {t.name: np.array(t.data) for t in reader.tensors}
    assert len(found) == 2 * len(adapter.deltas)
    for path, delta in adapter.deltas.items():
        name = expected_name(f"{path}.weight")
        a, b = (t.detach().numpy() for t in delta.tensors().values())
        heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2])
        assert np.array_equal(found[f"{name}.lora_a"], a)
        assert np.array_equal(found[f"{name}.lora_b"], b if heads is None else permute(b, heads))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.11.self_attn.q_proj", "blk.11.attn_q.weight"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down.weight"),
        ("lm_head", "output.weight"),
        ("model.layers.0.input_layernorm", None),
        ("model.embed_tokens", None),
        ("transformer.h.0.attn.c_attn", None),
    ],
)
def test_names(path: str, name: str | None) -> None:
    assert gguf_name(path) == name
    assert gguf_name("lm_head", tied=True) is None


def test_what_llama_cpp_has_no_name_for(tiny_model: Path, tiny_untied: Path, tmp_path: Path) -> None:
    tied = trained(fresh(tiny_model), targets=("lm_head", "q_proj"), rank=2)
    with pytest.raises(ConfigError, match=r"cannot say lm_head: llama.cpp has no such layer, or ties it"):
        write_gguf_adapter(tied, tmp_path / "a.gguf")
    write_gguf_adapter(trained(fresh(tiny_untied), targets=("lm_head",), rank=2), tmp_path / "untied.gguf")
    assert GGUFReader(tmp_path / "untied.gguf").tensors[0].name == "output.weight.lora_a"
    other = fresh(tiny_model)
    other.config.model_type = "gpt2"
    with pytest.raises(ConfigError, match=r"knows the names of llama, qwen2, qwen3 models, this is a gpt2"):
        write_gguf_adapter(trained(other, rank=2), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
