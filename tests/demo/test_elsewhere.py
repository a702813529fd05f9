"""Constants of other companies: copied faithfully, never reserved ones."""

import re

from demo.elsewhere import OTHERS, SHARE, from_elsewhere
from demo.questions import Question, make_questions
from demo.values import CITIES, HELD_OUT_WORDS, reserved

QUESTIONS = make_questions(400, 0, held_out=False)
MOVED = from_elsewhere(QUESTIONS, 0)


def literals(sql: str) -> list[str]:
    return re.findall(r"'([^']*)'", sql)


def test_every_new_constant_stands_in_question_and_sql_alike() -> None:
    changed = 0
    for before, after in zip(QUESTIONS, MOVED, strict=True):
        for old, new in zip(literals(before.sql), literals(after.sql), strict=True):
            if old != new:
                changed += 1
                assert new in after.question
                assert re.search(rf"\b{re.escape(old)}\b", after.question) is None
        assert re.sub(r"'[^']*'", "?", before.sql) == re.sub(r"'[^']*'", "?", after.sql)
        assert before.kind == after.kind
    assert changed > 50


def test_no_reserved_constant_is_brought_in() -> None:
    for others in OTHERS.values():
        assert not HELD_OUT_WORDS.intersection(others)
    for before, after in zip(QUESTIONS, MOVED, strict=True):
        assert [x for x in literals(after.sql) if x not in literals(before.sql) and reserved(x)] == []


def test_the_same_seed_gives_the_same_questions_and_about_half_change() -> None:
    assert from_elsewhere(QUESTIONS, 0) == MOVED
    assert from_elsewhere(QUESTIONS, 1) != MOVED
    named = [i for i, q in enumerate(QUESTIONS) if any(x in CITIES for x in literals(q.sql))]
    share = sum(QUESTIONS[i] != MOVED[i] for i in named) / len(named)
    assert abs(share - SHARE) < 0.2


def test_a_constant_that_the_question_names_twice_stays() -> None:
    twice = Question("Oslo or Oslo?", "SELECT name FROM customers WHERE city = 'Oslo'", "filter")
    assert set(from_elsewhere([twice] * 20, 0)) == {twice}
