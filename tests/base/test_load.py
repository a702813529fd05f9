"""Our loader against transformers' own: the same bits, less memory, and every misfit listed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from veneer.base.device import CPU, Device
from veneer.base.load import compute_with_, load_model
from veneer.base.storage_config import base_storage
from veneer.errors import ConfigError, ModelError
from veneer.models.skeleton import build_skeleton, load_tokenizer
from veneer.storage import bnb
from veneer.storage.layers import store_weight

IDS = torch.arange(3, 43).reshape(2, 20)


def same_as_transformers(folder: Path, dtype: torch.dtype, auto: Any = AutoModelForCausalLM) -> Any:
    """Load both ways and compare every parameter, buffer and output, bit for bit; returns ours."""
    ours, theirs = load_model(folder, dtype=dtype).network, auto.from_pretrained(folder, dtype=dtype).eval()
    assert type(ours) is type(theirs)
    for name, tensor in dict(theirs.named_parameters()).items():
        assert torch.equal(ours.get_parameter(name), tensor) and ours.get_parameter(name).dtype == tensor.dtype, name
    for name, tensor in dict(theirs.named_buffers()).items():
        assert torch.equal(ours.get_buffer(name), tensor) and ours.get_buffer(name).dtype == tensor.dtype, name
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS)[0], theirs(input_ids=IDS)[0])
    implementations = [str(network.config._attn_implementation) for network in (ours, theirs)]
    assert implementations in (["veneer", "sdpa"], ["eager", "eager"])
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_bit_for_bit(
    tiny_model: Path, tiny_untied: Path, dtype: torch.dtype, tied: bool
) -> None:
    ours = same_as_transformers(tiny_model if tied else tiny_untied, dtype)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


@pytest.mark.model
def test_the_real_model_equals_transformers_bit_for_bit(smollm2: Path) -> None:
    same_as_transformers(smollm2, torch.bfloat16)
    loaded = load_model(smollm2, dtype="float32")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = loaded.network.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert loaded.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 384, "n_positions": 64},
    "qwen3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "vocab_size": 384, "head_dim": 8},
    "gemma2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 48, "vocab_size": 384, "head_dim": 8},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 384,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "mixtral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "intermediate_size": 48, "vocab_size": 384, "num_local_experts": 2},
}  # fmt: skip


def made(folder: Path, tiny: Path, kind: str) -> Path:
    from transformers import AutoConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OTHERS[kind])).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, folder)
    return folder


@pytest.mark.parametrize("kind", list(OTHERS))
def test_other_architectures_load_the_same(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    same_as_transformers(made(tmp_path / kind, tiny_model, kind), torch.float32)


def test_a_checkpoint_without_the_base_prefix_loads(tmp_path: Path, tiny_model: Path) -> None:
    """As the hub's gpt2: "h.0..." for "transformer.h.0...", with old causal-mask buffers beside."""
    folder = made(tmp_path / "gpt2", tiny_model, "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, folder / "model.safetensors", {"format": "pt"})
    same_as_transformers(folder, torch.float32)


def test_a_model_without_a_head_loads_as_an_encoder(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=384, **shape)).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path)
    same_as_transformers(tmp_path, torch.float32, AutoModel)


def test_no_numbers_are_drawn_for_weights_that_are_not_there(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them into the meta device took two thirds of a build."""
    drawn: list[Any] = []
    real = torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda t, *args, **named: drawn.append(t) or real(t, *args, **named))
    built = build_skeleton(tiny_model, torch.float32)
    assert len(drawn) == 1  # by torch, as it makes an embedding
    assert all(p.is_meta for p in built.parameters()) and not any(b.is_meta for b in built.buffers())
    AutoModelForCausalLM.from_config(built.config)
    assert len(drawn) > 14  # transformers draws for every linear layer


def test_weights_are_frozen_and_the_model_evaluates(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model), dtype="float32")
    assert loaded.folder == tiny_model and loaded.name == str(tiny_model)
    assert not loaded.network.training
    assert not any(p.requires_grad for p in loaded.network.parameters())
    assert not any(p.is_meta for p in (*loaded.network.parameters(), *loaded.network.buffers()))
    assert loaded.network.generation_config.eos_token_id == 2
    assert loaded.tokenizer("a b").input_ids == load_tokenizer(tiny_model)("a b").input_ids


def test_loading_leaves_the_process_as_it_was(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    before = (torch.get_rng_state().tolist(), logging.get_verbosity(), logging.is_progress_bar_enabled(),
              torch.get_default_dtype())  # fmt: skip
    load_model(tiny_model, dtype="bfloat16")
    after = (torch.get_rng_state().tolist(), logging.get_verbosity(), logging.is_progress_bar_enabled(),
             torch.get_default_dtype())  # fmt: skip
    assert before == after
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert capfd.readouterr() == ("", "")


def changed(tiny: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(tiny, to)
    save_file(change(load_file(to / "model.safetensors")), to / "model.safetensors", {"format": "pt"})
    return to


def test_every_missing_unexpected_and_misfitting_tensor_is_listed(tmp_path: Path, tiny_model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(5, 32)
        return tensors | {"model.layers.7.extra": torch.ones(1)}

    with pytest.raises(ModelError) as caught:
        load_model(changed(tiny_model, tmp_path / "m", change), dtype="float32")
    assert str(caught.value).splitlines() == [
        "the weights do not fit LlamaForCausalLM as config.json describes it; 4 differ:",
        "  model.layers.0.mlp.up_proj.weight: needed by the model, not in the files",
        "  model.norm.weight: needed by the model, not in the files",
        "  model.layers.7.extra: in the files, unknown to the model",
        "  model.layers.1.self_attn.k_proj.weight: (5, 32) in the files, (16, 32) in the model",
        "Nothing was loaded. Weights and config.json must come from the same model.",
    ]


def test_a_tied_model_whose_files_hold_both_weights(tmp_path: Path, tiny_model: Path) -> None:
    """Equal copies are tied; different ones stay apart, as transformers does."""
    embedding = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    for name, head in {"equal": embedding.clone(), "different": embedding + 1}.items():
        folder = changed(tiny_model, tmp_path / name, lambda t, head=head: t | {"lm_head.weight": head})
        model = load_model(folder, dtype="float32").network
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is (name == "equal")
        assert torch.equal(model.lm_head.weight, head)


def test_an_unknown_architecture_and_a_cut_file_are_input_errors(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text()) | {"model_type": "noSuchModel"}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"a/config\.json: transformers builds no causal model from it: .*noSuchModel"):
        load_model(tmp_path / "a", dtype="float32")
    shutil.copytree(tiny_model, tmp_path / "b")
    weights = tmp_path / "b/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cut short"):
        load_model(tmp_path / "b", dtype="float32")


def test_quantized_weights_and_models_with_own_code_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    for name, addition, message in [
        (
            "q",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "holds weights quantized by gptq; give the",
        ),
        ("c", {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "transformers builds no causal model"),
    ]:
        shutil.copytree(tiny_model, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text()) | addition
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "own.py").write_text("raise SystemExit('the code was run')")
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / name, dtype="float32")


def test_a_tokenizer_that_does_not_load_is_named(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m/tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="m: the tokenizer does not load"):
        load_tokenizer(tmp_path / "m")


def test_dtypes_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CPU.dtype("bfloat16") is torch.bfloat16
    assert CPU.dtype(torch.float64) is torch.float64
    for chosen in ("float32", "bfloat16"):
        monkeypatch.setattr("veneer.machine.compute_dtype", lambda chosen=chosen: chosen)
        assert CPU.dtype("auto") is getattr(torch, chosen)
    with pytest.raises(ConfigError, match=r"there is no dtype 'float23'\. Did you mean 'float32'"):
        CPU.dtype("float23")


PEAK = """
import sys
from veneer import machine
from veneer.base.load import load_model
load_model(sys.argv[2], dtype="bfloat16")  # imports and first-use costs, on a tiny model
machine.trim_memory()  # what is free already would be taken again, and not be seen
before = machine.rss_bytes()
assert machine.reset_peak_rss()
model = load_model(sys.argv[1], dtype=sys.argv[3]).network
size = sum(p.nbytes for p in model.parameters())
largest = max(p.nbytes for p in model.parameters())
print(machine.peak_rss_bytes() - before, size, largest)
"""


@pytest.fixture(scope="session")
def big_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A LLaMA folder of about 200 MB in bfloat16, all zeros."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "big"
    shutil.copytree(tiny_model, folder)
    config = LlamaConfig.from_pretrained(
        tiny_model, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, folder / "model.safetensors")
    assert 180e6 < (folder / "model.safetensors").stat().st_size < 260e6
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset elsewhere")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_model_and_one_tensor(big_folder: Path, tiny_model: Path, dtype: str) -> None:
    """What is read is freed before the next tensor."""
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back to the system, not to the heap
    command = [sys.executable, "-c", PEAK, str(big_folder), str(tiny_model), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=exact)
    peak, size, largest = map(int, done.stdout.split())
    assert size <= peak < size + 2 * largest + 8e6, f"{peak=} {size=} {largest=}"


@pytest.mark.parametrize(
    ("asked", "kind", "installed", "chosen"),
    [
        ("auto", "cuda", True, "bitsandbytes"),
        ("auto", "cuda", False, "auto"),
        ("auto", "cpu", True, "auto"),
        ("veneer", "cuda", True, "veneer"),
        ("bitsandbytes", "cpu", True, "bitsandbytes"),
    ],
)
def test_kernels_of_4_bit_weights_are_chosen_by_device(
    asked: Any, kind: str, installed: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb, "installed", lambda: installed)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: self)
    storage = base_storage({"name": "nf4", "backend": asked})
    assert storage is not None
    network = torch.nn.Sequential(store_weight(torch.ones(64, 64), storage.config, "weight"))
    compute_with_(network, storage, Device(torch.device(kind)))
    assert network[0].backend == chosen
