"""Tokens that an adapter adds to a base: which ones may be, and whose tokenizer knows them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.methods.parity import fresh
from veneer.adapters.attach import attach, load_adapter
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.errors import AdapterMismatch, ConfigError
from veneer.methods.lora import LoRAConfig

NEW = ("<sql>", "</sql>", "<rows>", "<none>")
LORA = LoRAConfig(rank=2)


def test_a_tokenizer_that_does_not_go_on_from_the_bases_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    attach(load_model(tiny_model, dtype="float32"), LORA, new_tokens=NEW).save(tmp_path / "a")
    base = load_model(tiny_model, dtype="float32")
    base.tokenizer.add_tokens(["<chart>"])
    with pytest.raises(AdapterMismatch, match=r"does not go on from the base's: token '<chart>' is None there and 384"):
        load_adapter(base, tmp_path / "a", allow_no_effect=True)
    assert base.embedding_rows == 384 and not base.attached


@pytest.mark.parametrize(
    ("given", "said_"),
    [
        ({"new_tokens": ("",)}, "1 of the new tokens are empty"),
        ({"trained_tokens": ["<sql>"]}, "the tokenizer has no token '<sql>'; add it as a new token, or give its id"),
        ({"trained_tokens": [400]}, r"model.embed_tokens has 384 rows, so there is no token 400 to train"),
        ({"trained_tokens": {"norm": [4]}}, "'norm' has no rows of tokens of its own; embed_tokens of this model"),
        (
            {"trained_tokens": [4], "targets": ("q_proj", "embed_tokens")},
            "rows of model.embed_tokens are trained, and it",
        ),
    ],
)
def test_what_is_refused(tiny_model: Path, given: dict[str, Any], said_: str) -> None:
    base = load_model(tiny_model, dtype="float32")
    with pytest.raises(ConfigError, match=said_):
        attach(base, LORA, **given)
    assert not base.attached and base.embedding_rows == 384


def test_a_network_without_its_tokenizer_takes_no_new_tokens(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="new tokens need the base's tokenizer"):
        attach(Base.of(fresh(tiny_model)), LORA, new_tokens=NEW)


def test_an_adapter_is_loaded_onto_a_base_that_has_its_tokens_already(tiny_model: Path, tmp_path: Path) -> None:
    base = load_model(tiny_model, dtype="float32")
    attach(base, LORA, new_tokens=NEW).detach().save(tmp_path / "a")
    again = load_adapter(base, tmp_path / "a")
    assert len(base.tokenizer) == base.embedding_rows == 388 and again.new_tokens == NEW
    other = attach(base, LORA, new_tokens=("<sql>",), trained_tokens=["a", 5])
    assert other.parts[1].peft_fields()["trainable_token_indices"] == sorted({384, 5, base.tokenizer.get_vocab()["a"]})


def test_a_network_without_a_tokenizer_takes_a_saved_adapter(tiny_model: Path, tmp_path: Path) -> None:
    attach(load_model(tiny_model, dtype="float32"), LORA, new_tokens=NEW).save(tmp_path / "a")
    network = fresh(tiny_model)
    load_adapter(network, tmp_path / "a")
    assert network.config.vocab_size == 388


def test_a_token_beyond_the_tokenizer_is_refused_before_memory_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    attach(load_model(tiny_model, dtype="float32"), LORA, new_tokens=NEW).save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    ids = {"trainable_token_indices": [384, 385, 386, 10**12]}
    config.write_text(json.dumps(json.loads(config.read_text()) | ids))
    base = load_model(tiny_model, dtype="float32")
    with pytest.raises(AdapterMismatch, match="trains token 1000000000000, but its tokenizer has 388 tokens"):
        load_adapter(base, tmp_path / "a")
    assert base.embedding_rows == 384
