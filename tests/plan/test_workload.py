"""Work follows the rows' real lengths, and a light and a heavy micro-batch stand for all."""

import numpy as np
import pytest

from veneer.data.example import Example
from veneer.plan.workload import Load, batch_of, line_through, load_of, representatives


def rows(*lengths: int) -> list[Example]:
    return [Example(np.arange(n, dtype=np.int32), np.arange(n) >= n // 2, "rows", i) for i, n in enumerate(lengths)]


def test_work_counts_padding_of_tokens_and_of_documents() -> None:
    plain = load_of([0, 1], rows(40, 20), 1, width=10)
    assert plain.work == 12 * 10 * 60 + 3 * 2 * 40**2
    assert load_of([0, 1], rows(40, 20), 64, width=10).work - plain.work == 12 * 10 * 4
    assert load_of([0, 1], rows(30, 30), 1, width=10).work < plain.work
    assert plain.supervised == len(batch_of(plain, rows(40, 20), 1).targets) == 30


def test_a_first_token_is_no_target() -> None:
    whole = Example(np.arange(5, dtype=np.int32), np.ones(5, dtype=bool), "rows", 1)
    load = load_of([0], [whole], 1, width=10)
    assert load.supervised == len(batch_of(load, [whole], 1).targets) == 4


def test_those_alike_are_one_others_a_light_and_a_heavy_one() -> None:
    alike = [Load((i,), 100.0 + i, 5) for i in range(15)]
    assert representatives(alike) == [alike[7]]
    differing = [Load((i,), 100.0 * (i + 1), 5) for i in range(20)]
    assert representatives(differing) == [differing[2], differing[17]]
    assert representatives(differing[:2]) == differing[:2]


@pytest.mark.parametrize(
    ("points", "at", "seconds"),
    [
        ([(2.0, 6.0)], 4.0, 12.0),
        ([(2.0, 6.0), (4.0, 10.0)], 3.0, 8.0),
        ([(2.0, 6.0), (4.0, 10.0)], 6.0, 14.0),
        ([(2.0, 6.0), (4.0, 5.0)], 8.0, 6.0),  # noise: more work does not take less
        ([(2.0, 1.0), (4.0, 9.0)], 0.5, 0.0),
        ([(2.0, 6.0), (2.0, 7.0)], 2.0, 6.0),
    ],
)
def test_lines(points: list[tuple[float, float]], at: float, seconds: float) -> None:
    assert line_through(points)(at) == seconds
