"""Tokenizers of the kinds met in the wild, and rows without a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from veneer.data.sources import Row

settings.register_profile("unhurried", deadline=None)  # cores are shared; a slow example is no failure
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """Byte-level BPE with a ChatML template; eos is <|im_end|>, bos <|im_start|>."""
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def with_template(tiny_model: Path) -> Callable[..., Any]:
    """The same tokenizer with another chat template."""

    def make(template: str | None, **changes: Any) -> Any:
        made = AutoTokenizer.from_pretrained(tiny_model)
        made.chat_template = template
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    return make


@pytest.fixture(scope="session")
def spaced() -> Any:
    """SentencePiece-like: words that begin with a visible space, one put before every text; adds <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz?.[]/INST"
    words = ["<unk>", "<s>", "</s>", "\u2581", *sorted(set(letters)), "\u2581yo", "\u2581hi"]
    merges = [("y", "o"), ("h", "i"), ("\u2581", "yo"), ("\u2581", "hi")]
    vocabulary = {w: i for i, w in enumerate([*words, "yo", "hi"])}
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
    )
    return made


def row(**columns: Any) -> Row:
    return Row(columns, "rows.jsonl", 7)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(name="row")
def row_fixture() -> Callable[..., Row]:
    """`row(question=..., answer=...)`: a row of line 7 of rows.jsonl."""
    return row


@pytest.fixture(name="write_jsonl")
def write_jsonl_fixture() -> Callable[[Path, list[Any]], str]:
    """Write values as JSON lines; returns the path as text."""
    return write_jsonl
