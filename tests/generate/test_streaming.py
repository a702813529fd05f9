"""Prompts of conversations, and one streamed answer."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.base.base import Base
from veneer.data.prompt_format import RAW
from veneer.errors import ConfigError, ModelError
from veneer.generate.engine import generate
from veneer.generate.sampler import Sampling, greedy
from veneer.generate.streaming import encode, sampler_of, speak


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_encode_renders_the_chat_template_once(tokenizer: Any) -> None:
    ids = encode(tokenizer, [{"role": "user", "content": "Which city?"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhich city?<|im_end|>\n<|im_start|>assistant\n"
    assert encode(tokenizer, [{"role": "user", "content": "a b"}], plain=RAW) == tokenizer("a b")["input_ids"]


def test_without_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r'no chat template.*format="raw"'):
        encode(tokenizer, [{"role": "user", "content": "x"}])


def test_the_sampler() -> None:
    assert sampler_of(0) is greedy
    assert sampler_of(0.5, 0.9, 3, 7) == Sampling(temperature=0.5, top_p=0.9, top_k=3, seed=7)
    with pytest.raises(ConfigError, match="give a temperature above 0"):
        sampler_of(0, top_k=5)


def test_pieces_make_the_answer(model: Any, tokenizer: Any) -> None:
    tokens = encode(tokenizer, [{"role": "user", "content": "How many?"}])
    pieces: list[str] = []
    answer = speak(Base.of(model, tokenizer), tokens, max_new_tokens=15, show=pieces.append)
    ids = generate(Base.of(model), [tokens], max_new_tokens=15, stop_ids=[2])[0]
    assert answer.text == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.tokens == len(ids) and answer.stopped == (len(ids) < 15) and len(pieces) > 1


def test_a_stop_string(model: Any, tokenizer: Any) -> None:
    tokens = encode(tokenizer, [{"role": "user", "content": "How many?"}])
    whole = speak(Base.of(model, tokenizer), tokens, max_new_tokens=15, show=lambda piece: None).text
    stop = whole[5:7]
    answer = speak(Base.of(model, tokenizer), tokens, max_new_tokens=15, show=lambda piece: None, stop=[stop])
    assert answer.text == whole[: whole.index(stop)] and answer.stopped
