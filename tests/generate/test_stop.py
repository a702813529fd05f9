"""Texts end at the model's end tokens or before a stop string, wherever the pieces are cut."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from veneer.base.base import Base
from veneer.generate.stop import StopStrings, stop_ids


def test_stop_ids_are_those_of_tokenizer_configs_and_template(tiny_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=7), generation_config=SimpleNamespace(eos_token_id=[8, 9])
    )
    assert stop_ids(Base(model, tokenizer)) == {2, 7, 8, 9}
    assert stop_ids(Base(SimpleNamespace(config=SimpleNamespace(eos_token_id=None)), tokenizer)) == {2}


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_pieces_together_are_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    """Whatever the cuts, the result is that of cutting the whole text at the earliest stop that completes first."""
    stopper = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += stopper.feed(piece)
    whole = "".join(pieces)
    if stopper.found:
        assert stopper.rest() == "" and stopper.feed("more") == ""
        assert any(whole[len(shown) :].startswith(s) for s in stops)
        assert not any(s in shown for s in stops)
    else:
        assert not any(s in whole for s in stops)
        assert shown + stopper.rest() == whole


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    stopper = StopStrings(["END"])
    assert [stopper.feed(p) for p in ("one E", "NO", " two EN", "D three")] == ["one ", "ENO", " two ", ""]
    assert stopper.found
