"""Rows of tokens trained beside LoRA: as PEFT has them, tied or not, old tokens and new ones."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.methods.layers import moved
from tests.methods.parity import TOKENS, fresh, logits
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach, load_adapter
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.errors import AdapterMismatch, ConfigError
from veneer.merge.fold import merge
from veneer.methods.lora import LoRAConfig
from veneer.models.skeleton import load_tokenizer

NEW = ("<sql>", "</sql>", "<rows>", "<none>")
ASKED = torch.cat([TOKENS, torch.tensor([[384, 5, 385, 386], [387, 7, 5, 384]])], dim=1)
LORA = LoRAConfig(rank=2)


def shaken(adapter: Adapter) -> Adapter:
    for n, holder in enumerate(adapter.holders().values()):
        moved(holder, 0.2, seed=n)  # type: ignore[arg-type]
    return adapter.eval()


@torch.no_grad()
def said(model: Any, tokens: Tensor = ASKED) -> Tensor:
    return torch.as_tensor(model(tokens).logits)


def theirs(folder: Path, adapter: Path, rows: int = 384) -> Any:
    """The adapter on its base, by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft meets deprecations of transformers
        if rows > 384:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


both = pytest.mark.parametrize("name", ["tiny_model", "tiny_untied"])


@both
def test_rows_of_known_tokens_are_pefts(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    model = fresh(folder)
    plain = logits(model)
    adapter = shaken(attach(model, LORA, trained_tokens=[7, 5]))
    want = logits(model)
    assert not torch.equal(want, plain)
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [5, 7]
    assert not (tmp_path / "a" / "tokenizer.json").exists(), "no token is new"
    assert float((logits(theirs(folder, tmp_path / "a")) - want).abs().max()) < 1e-4
    adapter.detach()
    assert torch.equal(logits(model), plain)
    again = load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), want)
    assert again.kind == "lora + trained tokens"
    assert [(n.path, n.role, n.place) for n in again.named()[-1:]] == [("model.embed_tokens", "full", "embedding")]


@both
@pytest.mark.parametrize("given", [[5, 7], {"embed_tokens": [5, 7], "lm_head": [5, 7]}, {"lm_head": [9]}])
def test_pefts_rows_are_read(name: str, given: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(name)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=given, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(fresh(folder), config).eval()
        with torch.no_grad():
            for key, p in made.named_parameters():
                if "trainable_tokens_delta" in key:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        want = logits(made)
        made.save_pretrained(str(tmp_path / "a"))
    model = fresh(folder)
    adapter = load_adapter(model, tmp_path / "a")
    assert float((logits(model) - want).abs().max()) < 1e-4
    adapter.save(tmp_path / "b")
    before, after = (load_file(tmp_path / one / "adapter_model.safetensors") for one in "ab")
    assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()


@both
def test_new_tokens_are_saved_loaded_by_peft_and_merged(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    base = load_model(folder, dtype="float32")
    plain, print_ = said(base.network, TOKENS), base.fingerprint
    adapter = attach(base, LORA, new_tokens=NEW)
    rows = {n.path: n.parameter for n in adapter.named() if n.name == "rows"}
    assert list(rows) == ["model.embed_tokens", *(["lm_head"] if name == "tiny_untied" else [])]
    mean = base.embedding.weight[:384].mean(0)
    assert all(torch.allclose(row, mean) for row in rows["model.embed_tokens"]) and base.vocab_size == 388
    assert base.tokenizer("a<sql>b")["input_ids"][1] == 384 and base.fingerprint == print_
    shaken(adapter)
    want = said(base.network)
    assert want.shape[-1] == 388
    adapter.save(tmp_path / "a")
    with adapter.disabled():
        assert torch.equal(said(base.network, TOKENS)[..., :384], plain), "the base says the same of old tokens"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == 388
    assert float((said(theirs(folder, tmp_path / "a", 388)) - want).abs().max()) < 1e-4
    other = load_model(folder, dtype="float32")
    loaded = load_adapter(other, tmp_path / "a")
    assert torch.equal(said(other.network), want) and loaded.new_tokens == NEW
    assert other.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    merge(loaded, folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 388 and merged.config.tie_word_embeddings == (name == "tiny_model")
    assert float((said(merged) - want).abs().max()) < 1e-4
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 388
    assert torch.equal(said(load_model(tmp_path / "merged", dtype="float32").network), said(merged))


@both
def test_a_base_that_peft_has_grown_is_read(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """PEFT writes the whole embedding of a grown base; only the rows that the base lacks are taken from it."""
    folder: Path = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(NEW))
    model = fresh(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(388, mean_resizing=False)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[384, 385, 7])
        made = peft.get_peft_model(model, config).eval()
        made.peft_config["default"].base_model_name_or_path = str(folder)
        want = said(made)
        made.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    base = load_model(folder, dtype="float32")
    with pytest.raises(
        AdapterMismatch, match="has rows for 388 tokens, this LlamaForCausalLM for 384, and there is no"
    ):
        load_adapter(base, tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    adapter = load_adapter(base, tmp_path / "a")
    assert float((said(base.network) - want).abs().max()) < 1e-4
    assert adapter.n_params() < 388 * 32


def test_it_is_small_beside_the_embedding_of_a_real_model(tiny_model: Path, tmp_path: Path) -> None:
    """Of SmolLM2-135M's width and vocabulary: what new tokens add to the adapter, on disk and in memory."""
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=64, num_hidden_layers=1)
    base = Base.of(LlamaForCausalLM(config), load_tokenizer(tiny_model))
    plain = attach(base, LORA).detach().save(tmp_path / "plain")
    adapter = attach(base, LORA, new_tokens=NEW, trained_tokens=range(10))
    adapter.save(tmp_path / "rows")
    embedding = base.embedding.get_parameter("weight").nbytes
    assert sum(n.parameter.nbytes for n in adapter.named() if n.name == "rows") < 0.01 * embedding
    tensors = (tmp_path / "rows" / "adapter_model.safetensors").stat().st_size
    assert tensors - plain < 0.01 * embedding


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantized_base_has_a_dense_embedding_and_a_stored_one_is_refused(tiny_model: Path, storage: str) -> None:
    base = load_model(tiny_model, storage=storage, dtype="float32")
    adapter = shaken(attach(base, LORA, new_tokens=NEW))
    assert said(base.network).shape[-1] == 388 and adapter.attached
    stored = load_model(tiny_model, storage={"name": storage, "embeddings": True}, dtype="float32")
    with pytest.raises(ConfigError, match=r"model\.embed_tokens, lm_head is quantized"):
        attach(stored, LORA, new_tokens=NEW)
