"""A GGUF made with llama.cpp's layout becomes the model it was made from."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from veneer.errors import ModelError
from veneer.models.gguf import convert_gguf, deinterleave, llama3_factors

IDS = torch.arange(3, 43).reshape(2, 20)


def converted(file: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(file, folder)
    return folder


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_float32_file_gives_the_same_logits(
    tmp_path: Path, tiny_model: Path, tiny_untied: Path, gguf_writer: Callable[..., Path], tied: bool
) -> None:
    source = tiny_model if tied else tiny_untied
    folder = converted(gguf_writer(source, tmp_path / "x.gguf"), tmp_path / "x")
    assert torch.equal(logits(folder), logits(source))
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["rms_norm_eps"] == 1e-6 and config["num_key_value_heads"] == 2
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("kind", "dtype"), [("Q8_0", torch.bfloat16), ("Q4_1", torch.bfloat16), ("F16", torch.float16)]
)
def test_quantized_matrices_are_dequantized_and_vectors_kept(
    tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path], kind: str, dtype: torch.dtype
) -> None:
    folder = converted(gguf_writer(tiny_model, tmp_path / "x.gguf", kind=kind), tmp_path / "x")
    found, original = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        if tensor.ndim == 1:
            assert torch.equal(found[name], tensor)
            continue
        packed = quants.quantize(tensor.numpy(), GGMLQuantizationType[kind])
        expected = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType[kind])).to(dtype)
        assert torch.equal(found[name], expected), name


def test_qwen3_is_not_permuted_and_has_its_norms(
    tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path]
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = json.loads((tiny_model / "config.json").read_text())
    sizes = {key: value for key, value in config.items() if isinstance(value, int) and not key.endswith("_id")}
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.q_norm.weight)
    source = tmp_path / "source"
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(source)
    file = gguf_writer(source, tmp_path / "x.gguf", architecture="qwen3")
    assert torch.equal(logits(converted(file, tmp_path / "x")), logits(source))


def test_deinterleaving_undoes_the_permutation() -> None:
    weight = torch.arange(24.0).reshape(12, 2)
    swapped = weight.numpy().reshape(3, 2, 2, 2).swapaxes(1, 2).reshape(12, 2)
    assert torch.equal(deinterleave(torch.from_numpy(swapped.copy()), 3), weight)


def test_llama3_factors_are_those_of_transformers(tmp_path: Path, tiny_model: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    shape = {"hidden_size": 128, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 8}
    scaled = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)).model.rotary_emb.inv_freq.double().numpy()
    plain = 500000.0 ** -(np.arange(64) / 64)
    np.testing.assert_allclose(plain / llama3_factors(64, 500000.0, 8.0), scaled, rtol=1e-5)


def test_linear_rope_scaling_is_kept_and_others_are_refused(
    tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path]
) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    folder = converted(gguf_writer(tiny_model, tmp_path / "x.gguf", **linear), tmp_path / "x")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert rope == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="rope scaling 'yarn' is not supported"):
        converted(gguf_writer(tiny_model, tmp_path / "y.gguf", **{"llama.rope.scaling.type": "yarn"}), tmp_path / "y")


def test_missing_metadata_is_all_listed(tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path]) -> None:
    lost = {"llama.block_count": None, "llama.embedding_length": None}
    with pytest.raises(ModelError, match=r"lacks the metadata llama\.embedding_length, llama\.block_count"):
        converted(gguf_writer(tiny_model, tmp_path / "x.gguf", **lost), tmp_path / "x")


@pytest.mark.parametrize("keep", [0, 3, 200, -5000])
def test_a_broken_file_is_named(tmp_path: Path, tiny_gguf: Path, keep: int) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"cut\.gguf is not a complete GGUF file: .*Fetch it again"):
        converted(file, tmp_path / "x")


def test_an_architecture_nobody_reads_is_named(
    tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path]
) -> None:
    file = gguf_writer(tiny_model, tmp_path / "x.gguf", architecture="nosuch")
    with pytest.raises(
        ModelError, match=r"architecture 'nosuch' is read neither by veneer \(llama, qwen2, qwen3\) nor"
    ):
        converted(file, tmp_path / "x")


@pytest.mark.model
def test_the_real_file_was_converted_whole(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"]
    norms = [t for n, t in load_file(smollm2 / "model.safetensors").items() if "norm" in n]
    assert len(norms) == 61 and all(torch.equal(t.bfloat16().float(), t) for t in norms), "bfloat16 loses nothing there"
