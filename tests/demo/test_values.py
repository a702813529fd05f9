from random import Random

import pytest

from demo import values
from demo.values import pick, reserved, shuffled


@pytest.mark.parametrize(
    ("constant", "expected"),
    [
        ("Berlin", True),
        ("Oslo", False),
        ("Office Manager", True),
        ("Sales Manager", False),
        ("refunded", True),
        ("paid", False),
        ("60000", True),
        ("61000", False),
        ("3", True),
        ("2", False),
        ("2019", True),
        ("2020", False),
        ("2019-02-01", True),
        ("2020-03-03", False),
        ("March 2022", True),
        ("March 2023", False),
    ],
)
def test_words_are_listed_numbers_go_by_three_and_dates_by_their_year(constant: str, expected: bool) -> None:
    assert reserved(constant) is expected


def test_about_a_third_of_the_names_is_held_out() -> None:
    names = [f"{first} {last}" for first in values.FIRST_NAMES for last in values.LAST_NAMES]
    assert 0.28 < sum(map(reserved, names)) / len(names) < 0.39
    assert 5 <= sum(map(reserved, values.PROJECTS)) <= 14
    assert 8 <= sum(map(reserved, values.CUSTOMERS)) <= 20


def test_no_word_is_in_both_halves() -> None:
    assert not values.HELD_OUT_WORDS & values.TRAINING_WORDS


def test_pick_and_shuffled_use_every_item_and_repeat_by_seed() -> None:
    items = list(range(20))
    assert sorted(shuffled(Random(1), items)) == items
    assert shuffled(Random(1), items) == shuffled(Random(1), items) != shuffled(Random(2), items)
    rng = Random(3)
    assert {pick(rng, items) for _ in range(400)} == set(items)
