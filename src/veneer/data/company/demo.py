"""The demo's three files, and three questions to ask live."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.data.company.database import make_database
from veneer.data.company.elsewhere import from_elsewhere
from veneer.data.company.paraphrase import in_other_words
from veneer.data.company.questions import Question, make_questions
from veneer.disk.atomic import replacing

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


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo's data is."""

    database: Path
    """SQLite."""
    train: Path
    """JSON lines with the columns question, sql and kind."""
    held_out: Path
    """The same columns."""


def write_demo_files(folder: Path, *, train_rows: int = 3_000, held_out_rows: int = 200, seed: int = 0) -> DemoFiles:
    """Write company.sqlite, train.jsonl and held_out.jsonl into `folder`, each atomically.

    `seed` chooses the training rows.  The database and the held-out rows are the same for every seed.
    Raises ConfigError for more rows than there are questions, before anything is written; DiskError from writing.
    """
    files = DemoFiles(folder / "company.sqlite", folder / "train.jsonl", folder / "held_out.jsonl")
    train = in_other_words(from_elsewhere(make_questions(train_rows, seed, held_out=False), seed), seed)
    held_out = make_questions(held_out_rows, 0, held_out=True)
    make_database(files.database)
    _write_rows(files.train, train)
    _write_rows(files.held_out, held_out)
    return files


def _write_rows(path: Path, rows: list[Question]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
