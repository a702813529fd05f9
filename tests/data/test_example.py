import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.example import split, supervise, truncate


def test_the_first_token_is_never_a_target() -> None:
    assert supervise(4, [slice(0, 2), slice(3, 4)]).tolist() == [False, True, False, True]
    assert supervise(0, []).tolist() == []


@given(st.integers(2, 60), st.integers(2, 20))
def test_split_trains_every_token_but_the_first_exactly_once(length: int, most: int) -> None:
    ids = np.arange(length, dtype=np.int32)
    pieces = split(ids, most)
    trained = np.concatenate([part[mask] for part, mask in pieces])
    assert trained.tolist() == list(range(1, length))
    for part, mask in pieces:
        assert 2 <= len(part) <= most
        assert not mask[0]
        assert part.tolist() == list(range(part[0], part[0] + len(part)))  # context is the text itself


def test_truncate_keeps_the_last_answer_whole() -> None:
    ids = np.arange(10, 20, dtype=np.int32)  # 6 of prompt, 4 of answer
    kept = truncate(ids, [slice(6, 10)], 6, bos=None)
    assert kept is not None
    assert kept[0].tolist() == [14, 15, 16, 17, 18, 19]
    assert kept[1].tolist() == [False, False, True, True, True, True]
    assert truncate(ids, [slice(6, 10)], 5, bos=None) is not None
    assert truncate(ids, [slice(6, 10)], 4, bos=None) is None  # no context would be left


def test_truncate_keeps_the_begin_of_text_token() -> None:
    ids = np.arange(10, 20, dtype=np.int32)
    kept = truncate(ids, [slice(6, 10)], 6, bos=10)
    assert kept is not None
    assert kept[0].tolist() == [10, 15, 16, 17, 18, 19]
    assert kept[1].tolist() == [False, False, True, True, True, True]


def test_an_earlier_answer_that_lost_its_beginning_is_not_trained() -> None:
    ids = np.arange(10, dtype=np.int32)
    spans = [slice(1, 3), slice(4, 6), slice(8, 10)]
    for most, trained in ((8, [4, 5, 8, 9]), (7, [4, 5, 8, 9]), (6, [8, 9]), (5, [8, 9])):
        kept = truncate(ids, spans, most, bos=None)
        assert kept is not None
        assert kept[0][kept[1]].tolist() == trained
