"""A model folder as GGUF: what models/gguf.py reads back says the same, with every token, new ones too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.conftest import make_tokenizer
from tests.methods.layers import moved
from veneer.adapters.attach import attach
from veneer.base.load import load_model
from veneer.cli.main import invoke
from veneer.errors import ConfigError
from veneer.merge.gguf_model import write_gguf_model
from veneer.methods.lora import LoRAConfig
from veneer.models.gguf import convert_gguf, field

NEW = ("<sql>", "</sql>", "<rows>", "<none>")
TEXTS = ["SELECT count(*) FROM customers", "<sql>how many</sql> 1999 días", "<|im_start|>user\nhi<|im_end|>"]


def read_back(file: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(file, folder)
    return folder


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.as_tensor(model(tokens).logits)


def same(one: Path, other: Path) -> None:
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (one, other))
    assert first.get_vocab() == second.get_vocab()
    for text in TEXTS:
        assert first(text)["input_ids"] == second(text)["input_ids"]
    assert (first.eos_token_id, first.pad_token_id) == (second.eos_token_id, second.pad_token_id)
    assert first.chat_template == second.chat_template
    tokens = torch.randint(0, len(first), (2, 12), generator=torch.Generator().manual_seed(0))
    assert float((logits(one, tokens) - logits(other, tokens)).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["tiny_model", "tiny_untied"])
def test_an_adapter_with_new_tokens_is_merged_and_exported_with_its_vocabulary(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(name)
    base = load_model(folder, dtype="float32")
    adapter = attach(base, LoRAConfig(rank=2), new_tokens=NEW).eval()
    for n, holder in enumerate(adapter.holders().values()):
        moved(holder, 0.2, seed=n)  # type: ignore[arg-type]
    adapter.save(tmp_path / "a")
    tokens = torch.tensor([[5, 384, 6, 385, 386, 387, 9]])
    want = base.network(tokens).logits.detach()
    options = ["--adapter", str(tmp_path / "a"), "--to", "gguf-model", "--into", str(tmp_path / "m.gguf"), "--json"]
    assert invoke(["export", str(folder), *options]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m.gguf"]
    reader = GGUFReader(tmp_path / "m.gguf")
    words = field(reader, "tokenizer.ggml.tokens")
    assert len(words) == 388 == field(reader, "llama.vocab_size") and words[384:] == list(NEW)
    assert field(reader, "tokenizer.ggml.token_type")[384:] == [4] * 4
    back = read_back(tmp_path / "m.gguf", tmp_path / "back")
    assert float((logits(back, tokens) - want).abs().max()) < 1e-4
    assert AutoTokenizer.from_pretrained(back)("a<sql>b")["input_ids"][1] == 384


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "attention_bias": True},
        {"num_key_value_heads": 4, "head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_theta": 500000.0}},
    ],
)  # fmt: skip
def test_a_llama_is_read_back_as_it_was(changes: dict[str, Any], made_model: Any, tmp_path: Path) -> None:
    folder = made_model(tmp_path / "model", **changes)
    size = write_gguf_model(folder, tmp_path / "m.gguf")
    assert size == (tmp_path / "m.gguf").stat().st_size
    same(folder, read_back(tmp_path / "m.gguf", tmp_path / "back"))


@pytest.mark.parametrize("kind", [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_qwen_and_number_types_are_kept(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = {"vocab_size": 390, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = kind[0](**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    kind[1](config).to(dtype).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    write_gguf_model(tmp_path / "model", tmp_path / "m.gguf")
    back = read_back(tmp_path / "m.gguf", tmp_path / "back")
    tokens = torch.tensor([[1, 5, 200, 389]])
    assert float((logits(back, tokens) - logits(tmp_path / "model", tokens)).abs().max()) < 1e-5
    assert field(GGUFReader(tmp_path / "m.gguf"), "tokenizer.ggml.token_type")[-6:] == [5] * 6, "rows without a token"


def test_what_cannot_be_written_is_refused(made_model: Any, tmp_path: Path) -> None:
    folder = made_model(tmp_path / "model")
    config = folder / "config.json"
    plain = json.loads(config.read_text())
    for change, message in [
        ({"model_type": "gemma"}, "dense llama, qwen2, qwen3 models, this is a gemma"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' cannot be written"),
        ({"vocab_size": 300}, "has id 383, but the model has 300 rows"),
    ]:
        config.write_text(json.dumps(plain | change))
        with pytest.raises(ConfigError, match=message):
            write_gguf_model(folder, tmp_path / "m.gguf")
    config.write_text(json.dumps(plain))
    tokenizer = folder / "tokenizer.json"
    told = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps(told | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(ConfigError, match="splits text by no rule that veneer knows"):
        write_gguf_model(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
