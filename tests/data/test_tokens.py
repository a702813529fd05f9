from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.data.tokens import Encoder
from veneer.errors import ModelError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_one_piece_is_what_the_tokenizer_gives(tokenizer: Any, text: str) -> None:
    encoded = Encoder(tokenizer).encode([text], [()])[0]
    assert encoded.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@given(before=TEXT, after=TEXT)
def test_pieces_begin_with_the_tokens_of_the_text_before(tokenizer: Any, before: str, after: str) -> None:
    encoded = Encoder(tokenizer).encode([before + after], [[len(before)]])[0]
    first = tokenizer(before, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == first + tokenizer(after, add_special_tokens=False)["input_ids"]
    assert encoded.within(len(before), len(before + after)) == (
        slice(len(first), len(encoded.ids)) if after else slice(0, 0)
    )


def test_bytes_of_one_character_all_cover_it(tokenizer: Any) -> None:
    encoded = Encoder(tokenizer).encode(["a한b"], [()])[0]
    assert encoded.within(1, 2) == slice(1, 4)  # three bytes of UTF-8, three tokens
    assert encoded.starts.tolist() == [0, 1, 1, 1, 2]


def test_trimmed_offsets_and_truncation_of_the_tokenizer_do_not_reach_us(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = type(tokenizer)(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    encoded = Encoder(tokenizer).encode(["x " * 5], [()])[0]
    covered = np.concatenate([np.arange(a, b) for a, b in zip(encoded.starts, encoded.ends, strict=True)])
    assert covered.tolist() == list(range(10))


def test_a_tokenizer_that_puts_spaces_first_is_not_used_in_pieces(spaced: Any) -> None:
    encoder = Encoder(spaced)
    assert not encoder.in_pieces
    encoded = encoder.encode(["hi yo"], [[3]])[0]
    assert spaced.convert_ids_to_tokens(encoded.ids.tolist()) == ["▁hi", "▁yo"]
    assert encoded.within(3, 5) == slice(1, 2)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer object has no fast version"):
        Encoder(object())
