"""Training questions in other words: the SQL stays, and no held-out wording is taken."""

import re
from random import Random

import pytest

from demo.frames import FRAMES
from demo.paraphrase import INNER, WHOLE, in_other_words
from demo.phrases import NOUNS
from demo.questions import Question, make_questions

QUESTIONS = make_questions(600, 0, held_out=False)
SAID = in_other_words(QUESTIONS, 0)
HELD_OUT = make_questions(200, 0, held_out=True)


def test_sql_and_kind_stay_and_many_questions_change() -> None:
    assert [(q.sql, q.kind) for q in SAID] == [(q.sql, q.kind) for q in QUESTIONS]
    changed = sum(a != b for a, b in zip(QUESTIONS, SAID, strict=True))
    assert 0.25 < changed / len(QUESTIONS) < 0.8
    assert in_other_words(QUESTIONS, 0) == SAID


def test_no_rule_says_what_only_held_out_questions_say() -> None:
    held = [re.split(r"\{", sentence)[0].strip() for words in FRAMES.values() for sentence in words.held]
    openings = {h for h in held if len(h.split()) > 1}
    nouns = {n for noun in NOUNS.values() for n in noun.held}
    for _, others in (*INNER, *WHOLE):
        for text in others:
            assert not any(text.startswith(opening) for opening in openings), text
            assert "marked as" not in text
            assert not any(noun in text for noun in nouns)
    assert not {q.question for q in SAID} & {q.question for q in HELD_OUT}


def test_constants_survive() -> None:
    for before, after in zip(QUESTIONS, SAID, strict=True):
        assert sorted(re.findall(r"\d[\d-]*", before.question)) == sorted(re.findall(r"\d[\d-]*", after.question))


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("How many orders with the status paid are there?", {"flagged as paid", "recorded as paid"}),
        ("For each city, what is the mean salary of all people?", {"Per city, give me the mean salary of all people."}),
        ("Show the number of orders by customer city.", {"Group the number of orders by customer city."}),
    ],
)
def test_rules_read_as_english(text: str, seen: set[str]) -> None:
    question = Question(text, "SELECT 1", "filter")
    said = {in_other_words([question], seed)[0].question for seed in range(200)}
    assert all(any(part in s for s in said) for part in seen)
    assert not any("  " in s or "me me" in s for s in said)


def test_a_group_is_not_confused_with_a_doer() -> None:
    by_somebody = Question("Show the number of orders that were handled by Lena Lopez.", "SELECT 1", "aggregate")
    said = {in_other_words([by_somebody], Random(i).randint(0, 9999))[0].question for i in range(100)}
    assert not any(s.startswith(("Group", "Split", "Per", "For each")) for s in said)
