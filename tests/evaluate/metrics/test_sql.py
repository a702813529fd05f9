"""Execution accuracy over files and over tables made of rows."""

import sqlite3
from pathlib import Path

import pytest

from veneer.errors import DataError
from veneer.evaluate.metrics import METRICS, MetricOptions
from veneer.evaluate.metrics.sql import query_in

TABLE = {"schema": "t(name TEXT, year REAL)", "rows": [["Ann", 1990], ["Bob", 1985], ["Cid", 1990]]}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "company.db"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE t (name TEXT, year INT); INSERT INTO t VALUES ('Ann', 1990);")
    connection.close()
    return path


def one(prediction: str, reference: object, row: dict[str, object], options: MetricOptions) -> float | None:
    return METRICS["sql"]([prediction], [reference], [row], options).rows[0]


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("SELECT name FROM t WHERE year = 1990", "SELECT name FROM t WHERE year > 1986", True),
        ("SELECT name FROM t ORDER BY name DESC", "SELECT name FROM t", True),
        ("SELECT name FROM t ORDER BY name DESC", "SELECT name FROM t ORDER BY name", False),
        ("SELECT DISTINCT year FROM t", "SELECT year FROM t", False),
        ("```sql\nSELECT count(*) FROM t;\n```\nThis counts.", "SELECT 3", True),
        ("SELECT count(*) FROM t; DROP TABLE t", "SELECT 3", False),
        ("I do not know", "SELECT 3", False),
        ("", "SELECT 3", False),
        ("SELECT 2", ["SELECT 3", "SELECT 2"], True),
        ("SELECT avg(year) FROM t", "SELECT (1990 + 1985 + 1990) / 3.0", True),
    ],
)
def test_results_are_compared(prediction: str, reference: object, right: bool) -> None:
    assert one(prediction, reference, TABLE, MetricOptions()) == float(right)


def test_case_can_be_ignored() -> None:
    asked = "SELECT 'ANN' FROM t WHERE name = 'ann'"
    assert one(asked, "SELECT name FROM t WHERE name = 'Ann'", TABLE, MetricOptions()) == 0
    assert one(asked, "SELECT name FROM t WHERE name = 'Ann'", TABLE, MetricOptions(ignore_case=True)) == 1


def test_a_file_for_all_rows_or_for_each(database: Path) -> None:
    options = MetricOptions(database=database)
    assert one("SELECT name FROM t", "SELECT 'Ann'", {}, options) == 1
    assert one("SELECT name FROM t", "SELECT 'Ann'", {"database": str(database)}, MetricOptions()) == 1


def test_a_slow_query_is_wrong(database: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT count(*) FROM n"
    assert one(endless, "SELECT 1", {}, MetricOptions(database=database, seconds=0.05)) == 0


def test_the_value_is_the_mean() -> None:
    scores = METRICS["sql"](["SELECT 1", "SELECT 2"], ["SELECT 1", "SELECT 1"], [TABLE, TABLE], MetricOptions())
    assert scores.values == {"sql": 0.5} and scores.rows == [1.0, 0.0]


def test_rows_that_cannot_be_scored_are_named_together(tmp_path: Path) -> None:
    rows = [TABLE, {"question": "?"}, {"database": str(tmp_path / "none.db")}, {**TABLE, "schema": "nothing"}]
    with pytest.raises(DataError) as caught:
        METRICS["sql"](["SELECT 1"] * 4, ["SELECT none FROM t", *["SELECT 1"] * 3], rows, MetricOptions())
    message = str(caught.value)
    assert "4 of 4 rows cannot be scored" in message
    assert "row 1: the reference query does not run: no such column: none: SELECT none FROM t" in message
    assert "row 2: no database: give database=FILE" in message and "columns are question" in message
    assert "row 3: there is no SQLite database" in message
    assert "row 4: the schema 'nothing' is not of the form" in message


def test_a_missing_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no SQLite database .*absent\.db"):
        one("SELECT 1", "SELECT 1", {}, MetricOptions(database=tmp_path / "absent.db"))


def test_query_in() -> None:
    assert query_in("Sure:\n```SQL\nSELECT 1\n```\nand ```x```") == "SELECT 1"
    assert query_in(" SELECT 1 ") == "SELECT 1" and query_in("```\nSELECT 2") == "SELECT 2"
