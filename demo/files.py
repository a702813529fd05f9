"""The demo's files, and three questions to ask live."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from demo.database import database_sql
from demo.elsewhere import from_elsewhere
from demo.paraphrase import in_other_words
from demo.questions import Question, make_questions

SHOWCASE = (
    Question(
        "Can you list the employees located in Berlin who earn over 60000?",
        "SELECT name FROM employees WHERE city = 'Berlin' AND salary > 60000",
        "two filters",
    ),
    Question(
        "Tell me which 3 customers have the highest overall amount of orders made in 2022.",
        "SELECT c.name FROM orders o JOIN customers c ON o.customer_id = c.id WHERE o.order_date LIKE '2022%' "
        "GROUP BY c.name ORDER BY SUM(o.amount) DESC LIMIT 3",
        "top",
    ),
    Question(
        "Tell me which workers in Porto handled orders placed by customers in Bergen.",
        "SELECT DISTINCT e.name FROM employees e JOIN orders o ON o.employee_id = e.id "
        "JOIN customers c ON o.customer_id = c.id WHERE e.city = 'Porto' AND c.city = 'Bergen'",
        "three tables",
    ),
)
"""Questions in held-out words about held-out constants, with the SQL that answers them."""


TRAIN, MORE_TRAIN, HELD_OUT, MORE_HELD_OUT = 3_000, 1_000, 200, 300
"""Rows of each set: as many as `veneer demo` takes by default come first, and more follow."""


def write_demo_data(folder: Path) -> None:
    """Write company.sql, train.jsonl, held_out.jsonl and showcase.jsonl: always the same bytes."""
    train, more_train = _split(TRAIN, MORE_TRAIN, held_out=False)
    held_out, more_held_out = _split(HELD_OUT, MORE_HELD_OUT, held_out=True)
    texts = {
        "company.sql": database_sql(),
        "train.jsonl": _lines([*_varied(train, 0), *_varied(more_train, 1)]),
        "held_out.jsonl": _lines([*held_out, *more_held_out]),
        "showcase.jsonl": _lines(SHOWCASE),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _split(first: int, more: int, *, held_out: bool) -> tuple[list[Question], list[Question]]:
    """The `first` questions of seed 0, and `more` that go on where they end."""
    beginning = make_questions(first, 0, held_out)
    return beginning, [q for q in make_questions(first + more, 0, held_out) if q not in set(beginning)]


def _varied(questions: list[Question], seed: int) -> list[Question]:
    """Training questions, part of them in further words and about other companies' constants."""
    return in_other_words(from_elsewhere(questions, seed), seed)


def _lines(rows: Iterable[Question]) -> str:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows)
