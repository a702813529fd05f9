from random import Random

import pytest

from demo.constants import allowed, constants, number
from demo.phrases import FILTERS
from demo.values import MONTHS, reserved

NAMES = ["Mara Novak", "Jonas Silva", "Elena Weber", "Pavel Rossi", "Nora Costa", "Emil Sato", "Ravi Lopez"]


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("f", FILTERS, ids=lambda f: f"{f.table} {f.column} {f.op}")
def test_constants_are_all_held_out_or_none_is(f, held_out) -> None:  # type: ignore[no-untyped-def]
    for seed in range(30):
        texts, plain = constants(f, NAMES, Random(seed), held_out)
        assert len(texts) == len(plain) == (2 if f.op == "between" else 1)
        assert all(reserved(text) == held_out for text in texts)
        assert sorted(plain) == list(plain)
        if f.op == "month":
            month, year = texts[0].split()
            assert plain == (f"{year}-{MONTHS.index(month) + 1:02}%",)
        elif f.op == "year":
            assert plain == (f"{texts[0]}%",)
        else:
            assert tuple(map(str, plain)) == texts


def test_numbers_come_from_the_range() -> None:
    assert allowed(range(2, 8), held_out=True) == [3, 6]
    assert allowed(range(2, 8), held_out=False) == [2, 4, 5, 7]
    assert {number(range(2, 8), Random(seed), held_out=True) for seed in range(40)} == {3, 6}
