"""The tokenizer rebuilt from a GGUF cuts text as the one it was written from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from veneer.errors import ModelError
from veneer.models.gguf import convert_gguf


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_gguf: Path) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("converted")
    convert_gguf(tiny_gguf, folder)
    return AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny_model)


@given(text=st.text(max_size=60) | st.text("selct coun* from '19 <|im_end|>\n", max_size=60))
def test_every_text_gives_the_same_ids(both: tuple[Any, Any], text: str) -> None:
    ours, original = both
    assert ours(text).input_ids == original(text).input_ids
    assert ours.decode(ours(text).input_ids) == text


def test_specials_template_and_length_are_kept(both: tuple[Any, Any]) -> None:
    ours, original = both
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for ask in (False, True):
        kwargs = {"add_generation_prompt": ask, "tokenize": False}
        assert ours.apply_chat_template(talk, **kwargs) == original.apply_chat_template(talk, **kwargs)
    assert ours.model_max_length == 256
    assert ours.decode(ours("a<|im_end|>b").input_ids, skip_special_tokens=True) == "ab"


def tokens(folder: Path, file: Path, text: str) -> list[str]:
    folder.mkdir()
    convert_gguf(file, folder)
    return AutoTokenizer.from_pretrained(folder)(text).tokens()


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["2019"]),
        ("smollm", ["2", "0", "1", "9"]),
        ("qwen2", ["2", "0", "1", "9"]),
        ("llama-bpe", ["201", "9"]),
    ],
)
def test_each_rule_splits_digits_its_own_way(
    tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path], pre: str, expected: list[str]
) -> None:
    """Merges are replaced so that digits join wherever the split lets them."""
    merges = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": ["2 0", "20 1", "201 9"]}
    merges["tokenizer.ggml.tokens"] = [*vocabulary(tiny_model)[:381], "20", "201", "2019"]
    assert tokens(tmp_path / "x", gguf_writer(tiny_model, tmp_path / "x.gguf", **merges), "2019") == expected


def vocabulary(folder: Path) -> list[str]:
    found = AutoTokenizer.from_pretrained(folder).get_vocab()
    return sorted(found, key=found.__getitem__)


def test_a_file_that_asks_for_bos_gets_it(tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path]) -> None:
    file = gguf_writer(tiny_model, tmp_path / "x.gguf", **{"tokenizer.ggml.add_bos_token": True})
    assert tokens(tmp_path / "x", file, "a")[0] == "<|im_start|>"


def test_a_kind_that_cannot_be_rebuilt_is_named(
    tmp_path: Path, tiny_model: Path, gguf_writer: Callable[..., Path]
) -> None:
    file = gguf_writer(tiny_model, tmp_path / "x.gguf", **{"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(ModelError, match=r"x\.gguf: its tokenizer 'rwkv' \('gpt-2'\) cannot be rebuilt"):
        tokens(tmp_path / "x", file, "a")
