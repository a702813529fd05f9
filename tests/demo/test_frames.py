import string

import pytest

from demo.frames import FRAMES, Words

SLOTS = {"np", "np1", "noun", "vp", "of", "label", "extra", "f", "m", "g", "gs", "n", "k", "v", "w"}
SLOTS |= {"more", "above", "value", "best", "most", "who"}


@pytest.mark.parametrize(("name", "words"), FRAMES.items())
def test_sentences_are_seen_or_held_out_and_have_known_slots(name: str, words: Words) -> None:
    assert not set(words.seen) & set(words.held)
    for sentence in words.seen + words.held:
        slots = {slot for _, slot, _, _ in string.Formatter().parse(sentence) if slot is not None}
        assert slots <= SLOTS, sentence
        assert sentence[0].isupper() or sentence.startswith("{who}")
        asks = sentence.startswith(("What", "Which", "How", "{who}", "Can", "Do you", "For each"))
        assert sentence[-1] == ("?" if asks else "."), sentence


def test_no_sentence_of_one_frame_is_held_out_in_another() -> None:
    seen = {s for words in FRAMES.values() for s in words.seen}
    assert not seen & {s for words in FRAMES.values() for s in words.held}
