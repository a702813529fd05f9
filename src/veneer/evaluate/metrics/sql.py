"""sql: execution accuracy, the share of queries whose result is the reference query's.

The database is the option `database` for all rows, or each row's column `database` (a file), or a table made of its
columns `schema`, "t(a TEXT, b REAL)", and `rows`, a list of lists (files in WikiSQL's manner). Results are compared
as multisets, and in order where the reference query orders its rows.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import DataError, listed
from veneer.evaluate.metrics.base import METRICS, Columns, MetricOptions, Scores, alternatives, mean
from veneer.evaluate.sql_sandbox import QueryError, Sandbox, is_ordered, same_result

SHOWN = 5  # reference queries named in one message


@METRICS.add("sql")
def sql(predictions: Sequence[str], references: Sequence[Any], rows: Columns, options: MetricOptions) -> Scores:
    """In [0, 1]; an answer that is no single reading query, or takes too long, counts as wrong.

    With `ignore_case`, text in results is compared regardless of case, and so are the text columns of tables made from
    `schema` and `rows` inside the queries themselves.
    Raises DataError for databases that are not there and for reference queries that do not run, all at once.
    """
    hits: list[float] = []
    problems: list[str] = []
    for index, (prediction, reference, row) in enumerate(zip(predictions, references, rows, strict=True), start=1):
        try:
            with open_database(row, options) as database:
                hits.append(float(answers(database, prediction, alternatives(reference), options.ignore_case)))
        except (QueryError, DataError) as error:
            problems.append(f"row {index}: {error}")
    if problems:
        raise DataError(f"metric sql: {len(problems)} of {len(rows)} rows cannot be scored:\n{listed(problems, SHOWN)}")
    return mean("sql", hits)


def open_database(row: Mapping[str, Any], options: MetricOptions) -> Sandbox:
    """The database that a row's query is asked.  Raises DataError saying what to give."""
    if options.database is not None:
        return Sandbox.open(options.database, options.seconds)
    if row.get("database") is not None:
        return Sandbox.open(Path(str(row["database"])), options.seconds)
    if row.get("schema") is not None and row.get("rows") is not None:
        return Sandbox.of_table(str(row["schema"]), row["rows"], options.seconds, options.ignore_case)
    raise DataError(
        "no database: give database=FILE, or rows with a column `database`, or `schema` and `rows`; "
        f"the row's columns are {', '.join(row)}"
    )


def answers(database: Sandbox, prediction: str, references: Sequence[str], ignore_case: bool = False) -> bool:
    """Whether the predicted query gives what any of the reference queries gives.

    Raises QueryError, naming the reference, if one of them does not run.
    """
    expected = []
    for reference in references:
        try:
            expected.append((database.run(reference), is_ordered(reference)))
        except QueryError as error:
            raise QueryError(f"the reference query does not run: {error}: {reference}") from error
    try:
        got = database.run(query_in(prediction))
    except QueryError:
        return False
    return any(same_result(got, rows, ordered=ordered, ignore_case=ignore_case) for rows, ordered in expected)


def query_in(text: str) -> str:
    """The query in an answer: the first fenced block if there is one, else the whole text."""
    fenced = re.search(r"```(?:sql|sqlite)?\s*\n?(.*?)(?:```|$)", text, re.I | re.S)
    return (fenced[1] if fenced else text).strip()
