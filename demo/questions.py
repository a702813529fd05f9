"""Questions about the demo's company and the SQL that answers them, for training and held out."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from random import Random

from demo.constants import GROUP_NUMBERS, TOP_NUMBERS, constants, number
from demo.database import database_in_memory
from demo.plans import KINDS, Plan, plans
from demo.query import Query
from demo.values import pick, shuffled
from demo.wording import say

PLANS_TRIED = 25
"""Plans in a row without a new good question after which a kind is given up."""

DRAWS_OF_A_PLAN = 30
"""Draws of words and constants for one plan before another is taken, so that a plan of few good answers is not rare."""

ROWS_AT_MOST = 80
"""A question is not about more rows than this."""


@dataclass(frozen=True)
class Question:
    """One row of the demo's data."""

    question: str
    sql: str
    kind: str
    """One of KINDS."""


@dataclass(frozen=True)
class _Draw:
    question: str
    sql: str
    query: Query


def make_questions(n: int, seed: int, held_out: bool, *, database_seed: int = 0) -> list[Question]:
    """Draw `n` questions, the kinds in turn, about the company of `database_seed`; the same for the same arguments.

    Questions are unique.  Training and held-out ones share no sentence, no constant and no SQL; of most kinds, two in
    five held-out ones also combine parts in a way that no training question does.  No two held-out ones have the same
    SQL.  Every answer has rows, and changes when any condition is left out.

    Raises ValueError where there are not `n` such questions, or `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"asked for {n} company questions; ask for at least 1.")
    rng = Random(f"{'held out' if held_out else 'training'} {seed}")
    found: list[Question] = []
    with closing(database_in_memory(database_seed)) as connection:
        streams = {kind: _stream(kind, connection, rng, held_out) for kind in KINDS}
        for place in range(n):
            kind = KINDS[place % len(KINDS)]
            question = next(streams[kind], None)
            if question is None:
                raise ValueError(
                    f"asked for {n} company questions, but after {place} no new one of kind {kind!r} was found; "
                    f"ask for at most {place}."
                )
            found.append(question)
    return shuffled(rng, found)


def _stream(kind: str, connection: sqlite3.Connection, rng: Random, held_out: bool) -> Iterator[Question]:
    """Good questions of one kind, each new, until there are no more."""
    common = [[p for p in family if not p.reserved() and (p.open or not held_out)] for family in plans()[kind]]
    special = [[p for family in plans()[kind] for p in family if p.reserved()]]  # one family: some have a single one
    names = [name for (name,) in connection.execute("SELECT name FROM employees ORDER BY id")]
    seen: set[str] = set()
    made = failed = 0
    while failed < PLANS_TRIED:
        unseen = held_out and made % 5 < 2
        families = [f for f in (special if unseen else common) if f] or [f for f in common if f]
        plan = pick(rng, pick(rng, families))
        failed += 1
        for _ in range(DRAWS_OF_A_PLAN):
            drawn = _fill(plan, names, rng, held_out)
            key = "" if drawn is None else drawn.sql if held_out else drawn.question
            if drawn is not None and key not in seen and good(drawn.query, connection):
                failed, made = 0, made + 1
                seen.add(key)
                yield Question(drawn.question, drawn.sql, kind)
                break


def _fill(plan: Plan, names: list[str], rng: Random, held_out: bool) -> _Draw | None:
    """The plan with words and constants."""
    said = say(plan, rng, held_out)
    if said is None:
        return None
    markers: dict[str, str] = {}
    where = list(plan.query.where)
    for place, f in enumerate(plan.filters):
        texts, plain = constants(f, names, rng, held_out)
        markers |= {f"<{place}.{i}>": text for i, text in enumerate(texts)}
        where[place] = replace(where[place], values=plain)
    query = replace(plan.query, where=tuple(where[place] for place in said.order))
    if query.limit == "?":
        k = number(TOP_NUMBERS, rng, held_out)
        query, markers["<k>"] = replace(query, limit=k), str(k)
    if query.having:
        bound = number(GROUP_NUMBERS[f"{query.function} {query.measure}".strip()], rng, held_out)
        query, markers["<n>"] = replace(query, having=(query.having[0], bound)), str(bound)
    text = said.text
    for marker, constant in markers.items():
        text = text.replace(marker, constant)
    return _Draw(text, query.sql(), query)


def good(query: Query, connection: sqlite3.Connection) -> bool:
    """Whether the answer tells a right query from wrong ones.

    It has rows but not too many, counts more than two things, fills its LIMIT, is the same however ties are broken, and
    is not the answer of any weaker query.
    """
    rows = connection.execute(query.sql()).fetchall()
    if not 1 <= len(rows) <= ROWS_AT_MOST or rows[0][0] is None:
        return False
    if query.function and not query.group and rows[0][0] in (0, 1, 2):
        return False
    if query.group and not query.limit and len(rows) < 2:
        return False
    if query.limit and len(rows) < int(query.limit):
        return False
    if query.order and any(connection.execute(t).fetchall() != rows for t in _ties(query)):
        return False
    return all(sorted(connection.execute(w.sql()).fetchall()) != sorted(rows) for w in query.weaker())


def _ties(query: Query) -> Iterator[str]:
    """The query with ties broken by what is shown, upward and downward."""
    head, limit = query.sql().split(" LIMIT ")
    shown = head.split(" FROM ")[0].removeprefix("SELECT ")
    for way in ("", " DESC"):
        yield f"{head}, {shown}{way} LIMIT {limit}"
