"""The two sets share nothing they must not share, and every answer tells a right query from wrong ones.

The checks read the questions and the SQL texts themselves; they use none of the generator's own bookkeeping except
where they say so.
"""

import hashlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict

import pytest

from demo import KINDS, Question, make_questions
from demo.database import database_in_memory
from demo.frames import FRAMES
from demo.plans import plans
from demo.query import Query
from demo.questions import good

HELD_OUT_SHA256 = "eb13c731226751fec6bcce0e0fbb7b11bf5218c27d5edf118c39917ab59eb5c4"
MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
CONSTANT = re.compile(r"'([^']*)'|(?<![\w.])(?<!LIMIT )(\d+)\b|LIMIT (?!1$)(\d+)")


@pytest.fixture(scope="module")
def train() -> list[Question]:
    return make_questions(3_000, 0, held_out=False)


@pytest.fixture(scope="module")
def held_out() -> list[Question]:
    return make_questions(200, 0, held_out=True)


@pytest.fixture(scope="module")
def company() -> Iterator[sqlite3.Connection]:
    with closing(database_in_memory()) as connection:
        yield connection


def constants(sql: str) -> list[str]:
    """The constants as the question writes them."""
    found = []
    for text in (next(g for g in m.groups() if g is not None) for m in CONSTANT.finditer(sql)):
        month = re.fullmatch(r"(\d{4})-(\d\d)%", text)
        found.append(f"{MONTHS[int(month[2]) - 1]} {month[1]}" if month else text.removesuffix("%"))
    return found


def phrasing(question: Question) -> str:
    text = question.question
    for constant in sorted(constants(question.sql), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(constant)}(?!\w)", "#", text)
    return text


def conditions(sql: str) -> list[str]:
    where = re.search(r" WHERE (.*?)(?= GROUP BY| ORDER BY|$)", sql)
    return re.split(r"(?<!\d) AND |(?<=\d) AND (?=[a-z])", re.sub(r"' AND '", "'&'", where[1])) if where else []


def composition(sql: str) -> str:
    parts = conditions(sql)
    text = sql
    if parts:
        whole = re.search(r" WHERE (.*?)(?= GROUP BY| ORDER BY|$)", sql)
        assert whole is not None
        text = sql.replace(whole[1], " AND ".join(sorted(parts)))
    return CONSTANT.sub("?", text)


def test_no_question_no_sql_and_no_phrasing_is_in_both(train: list[Question], held_out: list[Question]) -> None:
    for part in (lambda q: q.question.lower(), lambda q: q.sql, phrasing):
        assert not {part(q) for q in train} & {part(q) for q in held_out}


def test_no_constant_is_in_both(train: list[Question], held_out: list[Question]) -> None:
    seen = {c for q in train for c in constants(q.sql)}
    assert len(seen) > 500
    assert not [q for q in held_out if set(constants(q.sql)) & seen]


def test_held_out_constants_are_not_even_mentioned_in_training(train: list[Question], held_out: list[Question]) -> None:
    text = "\n".join(q.question for q in train)
    for constant in {c for q in held_out for c in constants(q.sql)}:
        assert not re.search(rf"(?<![\w-]){re.escape(constant)}(?![\w-])", text), constant


def test_every_constant_stands_in_its_question_as_the_sql_has_it(
    train: list[Question], held_out: list[Question]
) -> None:
    for q in train + held_out:
        assert all(c in q.question for c in constants(q.sql)), q


def test_every_held_out_sentence_is_new(held_out: list[Question]) -> None:
    """No held-out question has the form of a training sentence, its slots filled in any way."""
    seen = [s for words in FRAMES.values() for s in words.seen]
    patterns = [re.compile(".+".join(map(re.escape, re.split(r"\{\w+\}", s)))) for s in seen]
    own = [o for families in plans().values() for f in families for p in f for o in p.own.seen]
    patterns += [re.compile(".+".join(map(re.escape, o.split("{v}")))) for o in own]
    assert not [q.question for q in held_out if any(p.fullmatch(q.question) for p in patterns)]


def test_over_a_third_of_the_held_out_questions_combines_parts_as_training_never_does(
    train: list[Question], held_out: list[Question]
) -> None:
    seen = {composition(q.sql) for q in train}
    new = Counter(q.kind for q in held_out if composition(q.sql) not in seen)
    assert sum(new.values()) >= len(held_out) / 3
    assert all(new[kind] >= 6 for kind in KINDS if kind != "filter"), new


def test_reserved_compositions_are_never_in_training(train: list[Question]) -> None:
    """By the generator's own list of what is reserved."""
    every = [p for families in plans().values() for family in families for p in family]
    reserved = {composition(p.query.sql()).replace("'?'", "?") for p in every if p.reserved()}
    assert len(reserved) > 100
    assert not {composition(q.sql) for q in train} & reserved


def test_the_held_out_set_stays_as_it_is(held_out: list[Question]) -> None:
    text = "".join(json.dumps(asdict(q)) + "\n" for q in held_out)
    assert hashlib.sha256(text.encode()).hexdigest() == HELD_OUT_SHA256


def test_another_training_seed_is_disjoint_too(held_out: list[Question]) -> None:
    other = make_questions(1_000, 1, held_out=False)
    assert not {c for q in other for c in constants(q.sql)} & {c for q in held_out for c in constants(q.sql)}
    assert not {phrasing(q) for q in other} & {phrasing(q) for q in held_out}


def test_kinds_are_equally_many_and_questions_unique(train: list[Question], held_out: list[Question]) -> None:
    assert Counter(q.kind for q in train) == dict.fromkeys(KINDS, 300)
    assert Counter(q.kind for q in held_out) == dict.fromkeys(KINDS, 20)
    assert len({q.question for q in train}) == 3_000
    assert len({q.sql for q in held_out}) == 200


def test_the_same_arguments_give_the_same_questions() -> None:
    assert make_questions(40, 3, held_out=False) == make_questions(40, 3, held_out=False)
    assert make_questions(40, 3, held_out=False) != make_questions(40, 4, held_out=False)


def test_answers_have_rows_and_every_condition_matters(
    train: list[Question], held_out: list[Question], company: sqlite3.Connection
) -> None:
    for q in train + held_out:
        rows = company.execute(q.sql).fetchall()
        assert rows and rows[0][0] is not None, q
        assert not (q.sql.startswith("SELECT COUNT") and rows[0][0] < 3), q
        parts = conditions(q.sql)
        for part in parts:
            rest = " AND ".join(p for p in parts if p != part).replace("'&'", "' AND '")
            whole = " AND ".join(parts).replace("'&'", "' AND '")
            weaker = q.sql.replace(f"WHERE {whole}", f"WHERE {rest}" if rest else "")
            assert weaker != q.sql
            assert Counter(company.execute(weaker).fetchall()) != Counter(rows), (q, weaker)


def test_no_tie_decides_who_is_in_the_top(
    train: list[Question], held_out: list[Question], company: sqlite3.Connection
) -> None:
    ordered = [q for q in train + held_out if " ORDER BY " in q.sql]
    assert len(ordered) > 300
    for q in ordered:
        match = re.fullmatch(r"SELECT .*? FROM (.*) ORDER BY (.*?)( DESC)? LIMIT (\d+)", q.sql)
        assert match is not None, q
        body, key, way, limit = match.groups()
        keys = company.execute(f"SELECT {key} FROM {body} ORDER BY 1{way or ''}").fetchall()[: int(limit) + 1]
        assert len(set(keys)) == len(keys) > 1, q


def test_answers_differ(held_out: list[Question], company: sqlite3.Connection) -> None:
    answers = Counter(str(sorted(company.execute(q.sql).fetchall())) for q in held_out)
    assert len(answers) >= 170
    assert max(answers.values()) <= 6


def test_training_covers_the_schema_and_the_language(train: list[Question], held_out: list[Question]) -> None:
    text = "\n".join(q.sql for q in train)
    for table in ("departments", "employees", "projects", "assignments", "customers", "orders"):
        assert len(re.findall(rf"(?:FROM|JOIN) {table}\b", text)) >= 100, table
    for word in (
        "COUNT(",
        "SUM(",
        "AVG(",
        "MIN(",
        "MAX(",
        "DISTINCT",
        "GROUP BY",
        "HAVING",
        "LIMIT",
        "BETWEEN",
        "LIKE",
        "!=",
    ):
        assert text.count(word) >= 50, word

    def shapes(questions: list[Question]) -> Counter[str]:
        return Counter(re.sub(r"^\w\.", "", CONSTANT.sub("?", c)) for q in questions for c in conditions(q.sql))

    seen = shapes(train)
    assert min(seen[shape] for shape in shapes(held_out)) >= 15
    assert len({phrasing(q) for q in train}) >= 1_500


def test_questions_and_sql_are_short(train: list[Question], held_out: list[Question]) -> None:
    assert max(len(q.question) for q in train + held_out) <= 150
    assert max(len(q.sql) for q in train + held_out) <= 220


def test_too_many_and_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match=r"asked for 0 company questions; ask for at least 1\."):
        make_questions(0, 0, held_out=True)
    with pytest.raises(ValueError, match=r"asked for 9000 company questions, but after (\d+) .*ask for at most \1\."):
        make_questions(9_000, 0, held_out=True)


def test_a_question_that_cannot_tell_is_not_good(company: sqlite3.Connection) -> None:
    count = Query(table="orders", function="COUNT")
    assert good(count, company)
    everything = Query(table="orders", columns=("orders.id",))
    assert not good(everything, company)  # 460 rows
    tied = Query(table="employees", columns=("employees.name",), order="employees.city", limit=1)
    assert not good(tied, company)
    unfilled = Query(table="departments", columns=("departments.name",), order="departments.budget", limit=12)
    assert not good(unfilled, company)
