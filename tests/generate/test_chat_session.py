"""A conversation remembers its turns, and an adapter that is switched answers as if it had always been there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.base.base import Base
from veneer.errors import ConfigError
from veneer.generate.chat_session import ChatSession
from veneer.generate.streaming import encode, speak


class Shift:
    """A stand-in for an adapter: adds a constant to what the last block's MLP gives."""

    def __init__(self, model: Any, seed: int) -> None:
        self.module = model.model.layers[0].mlp
        self.vector = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 3
        self.hook: Any = None

    def attach(self) -> None:
        self.hook = self.module.register_forward_hook(lambda module, args, out: out + self.vector)

    def detach(self) -> None:
        self.hook.remove()


@pytest.fixture
def talk(tiny_model: Path) -> ChatSession:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    adapters = {"sql": Shift(model, 0), "math": Shift(model, 1)}
    return ChatSession(Base.of(model, AutoTokenizer.from_pretrained(tiny_model)), adapters, max_new_tokens=8)


def afresh(talk: ChatSession, messages: list[dict[str, str]]) -> str:
    """The answer without any memory."""
    tokens = encode(talk.base.tokenizer, messages)
    return speak(talk.base, tokens, max_new_tokens=8, show=lambda piece: None).text


def test_turns_and_adapters(talk: ChatSession) -> None:
    messages: list[dict[str, str]] = []
    for question, adapter in [
        ("Which city?", None),
        ("and then?", None),
        ("more", "sql"),
        ("x", "math"),
        ("y", "none"),
    ]:
        if adapter is not None:
            assert talk.switch(adapter) == f"adapter {adapter}"
        messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        answer = talk.ask(question, pieces.append)
        assert answer.text == "".join(pieces) == afresh(talk, messages)
        messages.append({"role": "assistant", "content": answer.text})
    assert talk.turns == messages
    assert len({m["content"] for m in messages if m["role"] == "assistant"}) > 2
    assert talk.base.network.model.layers[0].mlp._forward_hooks == {}


def test_the_memory_is_used(talk: ChatSession) -> None:
    talk.ask("Which city has the largest number of customers? " * 3, lambda piece: None)
    lengths: list[int] = []
    talk.base.network.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    talk.ask("and?", lambda piece: None)
    whole = encode(talk.base.tokenizer, talk.turns[:3])
    assert 1 < lengths[0] < len(whole) / 2


def test_the_system_message_and_reset(talk: ChatSession) -> None:
    talk.ask("one", lambda piece: None)
    talk.system = "Be brief."
    talk.reset()
    answer = talk.ask("two", lambda piece: None)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
    assert answer.text == afresh(talk, messages) and len(talk.turns) == 2


def test_an_interrupted_answer_keeps_what_was_shown(talk: ChatSession) -> None:
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("one", show)
    assert talk.turns == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "".join(shown)}]
    answer = talk.ask("two", lambda piece: None)
    assert answer.text == afresh(talk, talk.turns[:-1])


def test_a_question_that_fails_is_forgotten(talk: ChatSession) -> None:
    with pytest.raises(ValueError, match="positions"):
        talk.ask("word " * 500, lambda piece: None)
    assert talk.turns == []


def test_an_unknown_adapter_changes_nothing(talk: ChatSession) -> None:
    talk.switch("sql")
    with pytest.raises(ConfigError, match=r"no adapter 'mth'\. Did you mean 'math'\? There are: sql, math, none\."):
        talk.switch("mth")
    assert talk.adapter == "sql" and talk.listing() == "* sql\n  math\n  none"
