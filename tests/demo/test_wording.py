import re
from dataclasses import replace
from random import Random

import pytest

from demo.frames import Words
from demo.phrases import Filter
from demo.plans import Plan, plans
from demo.query import Query
from demo.wording import say

EVERY = [plan for families in plans().values() for family in families for plan in family]
LIST = Query(table="employees", columns=("employees.name",))


def texts(filters: list[str], sentence: str, frame: str = "handler") -> set[str]:
    made = tuple(Filter("employees", f"employees.x{i}", "=", (p,), (p,)) for i, p in enumerate(filters))
    plan = Plan(frame, LIST, made, own=Words((sentence,)))
    said = [say(plan, Random(seed), held_out=False) for seed in range(30)]
    return {re.sub("people|staff members", "employees", s.text) for s in said if s}


@pytest.mark.parametrize(
    ("filters", "sentence", "expected"),
    [
        (["in {}"], "List the {np}.", "List the employees in <0.0>."),
        (["+live in {}"], "List the {np}.", "List the employees who live in <0.0>."),
        (["+live in {}"], "Which {noun} {vp}?", "Which employees live in <0.0>?"),
        (["+earn {}", "in {}"], "Which {noun} {vp}?", "Which employees in <1.0> earn <0.0>?"),
        (["+do not live in {}", "+earn {}"], "{noun} {vp}?", "employees earn <1.0> and do not live in <0.0>?"),
        (["with a {}", "with the {}"], "Show {np}.", "Show employees with a <0.0> and the <1.0>."),
        (["~with an order {}", "with the {}"], "Show {np}.", "Show employees with the <1.0> and an order <0.0>."),
        (["hired {}", "in {}"], "Show {np}.", "Show employees in <1.0> hired <0.0>."),
        (["hired {}", "paid {}"], "Show {np}.", "Show employees hired <0.0> and paid <1.0>."),
        (["between {} and {}"], "Show {np}.", "Show employees between <0.0> and <0.1>."),
        (["in {}"], "Name the {np1}.", "Name the employee in <0.0>."),
        ([], "Pay {of}.", "Pay of all employees."),
        (["in {}"], "Pay {of}.", "Pay of employees in <0.0>."),
    ],
)
def test_conditions_are_put_together_as_people_do(filters: list[str], sentence: str, expected: str) -> None:
    assert texts(filters, sentence) == {expected}


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        (["in {}", "in {}"], "List the {np}."),
        (["in {}"], "Which {noun} {vp}?"),
        (["+live in {}"], "Name the {np1}."),
        (["+live in {}"], "How many {np} are there?"),
    ],
)
def test_what_would_read_badly_is_not_said(filters: list[str], sentence: str) -> None:
    assert texts(filters, sentence) == set()


def test_the_order_is_that_of_the_text() -> None:
    for number, plan in enumerate(EVERY):
        said = say(plan, Random(number), held_out=bool(number % 2))
        if said is None or not plan.filters:
            continue
        markers = [int(m) for m in re.findall(r"<(\d)\.0>", said.text)]
        assert markers == list(said.order), said


def test_every_plan_can_be_said_in_both_halves() -> None:
    for plan in EVERY:
        for held_out in (True, False):
            found = next((s for seed in range(200) if (s := say(plan, Random(seed), held_out))), None)
            assert found is not None, plan
            assert "{" not in found.text and "~" not in found.text and "+" not in found.text
            assert "  " not in found.text and " ." not in found.text and " ?" not in found.text


def test_a_held_out_sentence_is_never_a_seen_one() -> None:
    plan = replace(EVERY[0])
    seen = {s.text for seed in range(300) if (s := say(plan, Random(seed), held_out=False))}
    held = {s.text for seed in range(300) if (s := say(plan, Random(seed), held_out=True))}
    assert seen and held and not seen & held
