"""Streamed text is the text decoded at once, and no piece of it ends in half a character."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from veneer.generate.detokenizer import StreamDecoder


@pytest.mark.parametrize(
    "text",
    ["SELECT name FROM t", "고객이 몇 명입니까?", "naïve – 日本語 🙂👩‍👩‍👧 end", "  two  spaces\n\nand lines", ""],
)
def test_pieces_join_to_the_whole_and_hold_whole_characters(tiny_model: Path, text: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)  # byte-level: a Hangul syllable is three tokens
    tokens = tokenizer.encode(text)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(t) for t in tokens]
    assert not any("\ufffd" in p for p in pieces)
    assert "".join(pieces) + decoder.rest() == text


def test_a_character_that_never_ends_is_shown_at_the_end(tiny_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokens = tokenizer.encode("ab 고")[:-1]
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.feed(t) for t in tokens) == "ab "
    assert decoder.rest() == tokenizer.decode(tokens)[3:] != ""
    assert decoder.rest() == ""


def test_special_tokens_are_not_shown(tiny_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.feed(t) for t in [1, *tokenizer.encode("user"), 2, *tokenizer.encode(" x")]) == "user x"
