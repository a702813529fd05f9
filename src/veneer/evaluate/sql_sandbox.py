"""Queries that somebody else wrote, run on SQLite where they can only read, and only that database.

A connection is read-only three times over (opened so, `query_only`, and an authorizer that lets nothing but reading
through), a query is one statement, and its time, its rows and the size of its values are limited.
"""

import re
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from veneer.errors import DataError, VeneerError

MOST_ROWS = 10_000
"""Rows of one result; a query with more is not scored as right."""
MOST_BYTES = 10_000_000
"""Of one value."""
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}
CHECK_EVERY = 1000
"""Steps of SQLite's machine between looks at the clock."""

Cell = str | int | float | bytes | None
Result = list[tuple[Cell, ...]]


class QueryError(VeneerError):
    """A query that does not run, is not allowed, or takes too long or too much."""


class Sandbox:
    """One database, open for reading."""

    def __init__(self, connection: sqlite3.Connection, seconds: float = 5.0) -> None:
        self._connection, self.seconds = connection, seconds
        self._deadline = 0.0
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_authorizer(_only_reading)
        connection.set_progress_handler(lambda: int(time.monotonic() > self._deadline), CHECK_EVERY)

    @classmethod
    def open(cls, file: Path, seconds: float = 5.0) -> Self:
        """An existing database file.  Raises DataError if it is missing or no SQLite database."""
        if not file.is_file():
            raise DataError(f"there is no SQLite database {file} (looked at {file.absolute()})")
        try:
            connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
            connection.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.Error as error:
            raise DataError(f"{file} does not open as an SQLite database: {error}") from error
        return cls(connection, seconds)

    @classmethod
    def of_table(cls, schema: str, rows: Sequence[Sequence[Any]], seconds: float = 5.0, nocase: bool = False) -> Self:
        """A database in memory with one table, `name(column TYPE, ...)`, and its rows.

        nocase   compare its text columns regardless of (ASCII) case
        Raises DataError for a schema that is not of that form, or rows that do not fit it.
        """
        name, columns = _parsed(schema)
        connection = sqlite3.connect(":memory:")
        kinds = [f"{column} COLLATE NOCASE" if nocase else column for column in columns]
        try:
            connection.execute(f"CREATE TABLE {name} ({', '.join(kinds)})")
            connection.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})", rows)
            connection.commit()
        except (sqlite3.Error, sqlite3.Warning) as error:
            connection.close()
            raise DataError(f"no table can be made from the schema {schema!r} and its rows: {error}") from error
        return cls(connection, seconds)

    def run(self, sql: str) -> Result:
        """All rows of one reading statement.  Raises QueryError in words for anything else."""
        self._deadline = time.monotonic() + self.seconds
        try:
            cursor = self._connection.execute(sql)
            rows = cursor.fetchmany(MOST_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            why = f"took longer than {self.seconds:g} s" if str(error) == "interrupted" else str(error)
            raise QueryError(why or type(error).__name__) from error
        cursor.close()
        if cursor.description is None and not rows:
            raise QueryError("no SELECT statement")
        if len(rows) > MOST_ROWS:
            raise QueryError(f"more than {MOST_ROWS} rows")
        return rows

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _only_reading(action: int, first: str | None, second: str | None, database: str | None, via: str | None) -> int:
    if action not in READING or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FORBIDDEN_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _parsed(schema: str) -> tuple[str, list[str]]:
    """ "t(a TEXT, from REAL)" -> ("t", ['"a" TEXT', '"from" REAL']); a column may be named like a word of SQL."""
    match = re.fullmatch(r"\s*(?:CREATE\s+TABLE\s+)?(\w+|\"[^\"]+\")\s*\((.+)\)\s*;?\s*", schema, re.I | re.S)
    parts = [re.fullmatch(r"\s*(\w+|\"[^\"]+\")(\s+\w+)?\s*", c) for c in match[2].split(",")] if match else []
    columns = [f'"{p[1].strip(chr(34))}"{p[2] or ""}' for p in parts if p is not None]
    if match is None or len(columns) < len(parts):
        raise DataError(f"the schema {schema!r} is not of the form table(column TYPE, ...)")
    return match[1], columns


def same_result(got: Result, wanted: Result, *, ordered: bool = False, ignore_case: bool = False) -> bool:
    """Whether two results are the same rows, as often, in any order unless `ordered`.

    Numbers are equal within one part in a million (1 is 1.0), text as it is stored, and text is never a number.
    Columns count in their order, whatever their names.
    """
    if len(got) != len(wanted):
        return False
    mine, theirs = ([_keyed(row, ignore_case) for row in rows] for rows in (got, wanted))
    if not ordered:
        mine, theirs = sorted(mine), sorted(theirs)
    if all(_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
        return True
    return not ordered and _matched(mine, theirs)


Key = tuple[tuple[str, ...], tuple[float, ...]]
"""A row as its texts (with numbers marked) and its numbers."""


def _keyed(row: Iterable[Cell], ignore_case: bool) -> Key:
    texts, numbers = [], []
    for cell in row:
        if isinstance(cell, int | float):
            texts.append("n")
            numbers.append(float(cell))
        elif isinstance(cell, str):
            texts.append("t" + (cell.casefold() if ignore_case else cell))
        else:
            texts.append("0" if cell is None else "b" + cell.hex())
    return tuple(texts), tuple(numbers)


def _equal(a: Key, b: Key) -> bool:
    return a[0] == b[0] and all(
        x == y or abs(x - y) <= 1e-6 * max(1.0, abs(x), abs(y)) for x, y in zip(a[1], b[1], strict=True)
    )


def _matched(mine: list[Key], theirs: list[Key]) -> bool:
    """Pair rows one by one: two sorted lists need not agree in order where their numbers differ by rounding."""
    left = list(theirs)
    for row in mine:
        partner = next((i for i, other in enumerate(left) if _equal(row, other)), None)
        if partner is None:
            return False
        left.pop(partner)
    return True


def is_ordered(sql: str) -> bool:
    """Whether the statement's own rows are ordered: ORDER BY outside all parentheses, strings and comments."""
    pattern = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|$)|[()]|\border\s+by\b"
    depth = 0
    for token in re.findall(pattern, sql, re.I | re.S):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0 and token[0] in "oO":
            return True
    return False
