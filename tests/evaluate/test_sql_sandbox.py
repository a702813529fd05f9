"""A query in the sandbox reads one database and does nothing else; results compare as SQL's multisets."""

import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import DataError
from veneer.evaluate import sql_sandbox
from veneer.evaluate.sql_sandbox import QueryError, Sandbox, is_ordered, same_result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "company 1?.db"  # a name that a URI must escape
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE t (a TEXT, b REAL); INSERT INTO t VALUES ('x', 1), ('y', 2.5);")
    connection.close()
    return path


def test_reads(file: Path) -> None:
    with Sandbox.open(file) as database:
        assert database.run("SELECT a, b FROM t ORDER BY b DESC;") == [("y", 2.5), ("x", 1.0)]
        assert database.run("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<3) SELECT * FROM n")
        assert database.run("SELECT count(*), upper(a) FROM t WHERE b > 9") == [(0, None)]


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM t",
        "INSERT INTO t VALUES ('z', 3)",
        "UPDATE t SET b = 0",
        "DROP TABLE t",
        "CREATE TABLE u (a)",
        "CREATE TEMP TABLE u (a)",
        "ATTACH DATABASE 'other.db' AS o",
        "ATTACH ':memory:' AS o",
        "VACUUM INTO 'copy.db'",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(t)",
        "SELECT load_extension('x')",
        "SELECT 1; DELETE FROM t",
        "BEGIN",
        "EXPLAIN DELETE FROM t",
        "",
        "-- nothing",
        "not sql",
        "SELECT nothing FROM t",
        "SELECT '\x00",
        "SELECT '\ud800'",
    ],
)
def test_does_nothing_but_read(file: Path, sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    before = file.read_bytes()
    with Sandbox.open(file) as database, pytest.raises(QueryError):
        database.run(sql)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_file_beside_it_cannot_be_read(file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.db"
    with sqlite3.connect(secret) as connection:
        connection.execute("CREATE TABLE s (a)")
    connection.close()
    with Sandbox.open(file) as database, pytest.raises(QueryError, match=r"not authorized|too many attached"):
        database.run(f"ATTACH DATABASE '{secret}' AS s")


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT count(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 100000000) SELECT sum(i) FROM n",
    ],
)
def test_time_is_limited(file: Path, sql: str) -> None:
    start = time.monotonic()
    with Sandbox.open(file, seconds=0.1) as database:
        with pytest.raises(QueryError, match=r"took longer than 0\.1 s"):
            database.run(sql)
        assert time.monotonic() - start < 3
        assert database.run("SELECT count(*) FROM t") == [(2,)]  # the next query has its own time


def test_rows_and_sizes_are_limited(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_sandbox, "MOST_ROWS", 5)
    with Sandbox.open(file) as database:
        with pytest.raises(QueryError, match="more than 5 rows"):
            database.run("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT i FROM n")
        with pytest.raises(QueryError, match="too big"):
            database.run("SELECT length(zeroblob(1000000000))")


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no SQLite database .*none\.db"):
        Sandbox.open(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("hello " * 100)
    with pytest.raises(DataError, match=r"text\.db does not open as an SQLite database: file is not a database"):
        Sandbox.open(tmp_path / "text.db")


def test_a_table_of_schema_and_rows() -> None:
    with Sandbox.of_table('CREATE TABLE t ("order" TEXT, from REAL, plain);', [["a", 1, None]]) as database:
        assert database.run('SELECT "from", "order", plain FROM t') == [(1.0, "a", None)]
    with Sandbox.of_table("t(name TEXT, year REAL)", [["Ann", 1990], ["bob", None]]) as database:
        assert database.run("SELECT name FROM t WHERE year = 1990") == [("Ann",)]
        assert database.run("SELECT name FROM t WHERE name = 'ann'") == []
        with pytest.raises(QueryError):
            database.run("DELETE FROM t")
    with Sandbox.of_table("t(name TEXT, year REAL)", [["Ann", 1990]], nocase=True) as database:
        assert database.run("SELECT name FROM t WHERE name = 'ann'") == [("Ann",)]


@pytest.mark.parametrize(
    ("schema", "rows"),
    [
        ("t", []),
        ("t()", []),
        ("t(a TEXT); DROP TABLE t", []),
        ("t(a TEXT) AS SELECT 1", []),
        ("t(a TEXT DEFAULT (random()))", []),
        ("t(a TEXT, b TEXT)", [["one"]]),
        ("t(a TEXT, a TEXT)", []),
        ("t(a TEXT)", [[["list"]]]),
    ],
)
def test_a_schema_that_is_none(schema: str, rows: list[list[object]]) -> None:
    with pytest.raises(DataError, match="schema"):
        Sandbox.of_table(schema, rows)


@pytest.mark.parametrize(
    ("got", "wanted", "ordered", "same"),
    [
        ([("a",), ("b",)], [("b",), ("a",)], False, True),
        ([("a",), ("b",)], [("b",), ("a",)], True, False),
        ([("a",), ("a",)], [("a",)], False, False),
        ([("a",), ("a",), ("b",)], [("a",), ("b",), ("b",)], False, False),
        ([(1,)], [(1.0,)], False, True),
        ([("1",)], [(1,)], False, False),
        ([(None,)], [(None,)], False, True),
        ([(None,)], [("",)], False, False),
        ([(0,)], [(None,)], False, False),
        ([(0.1 + 0.2,)], [(0.3,)], False, True),
        ([(1e9,)], [(1e9 + 1,)], False, True),
        ([(1.0,)], [(1.001,)], False, False),
        ([("A",)], [("a",)], False, False),
        ([(b"x",)], [("x",)], False, False),
        ([(1, 2)], [(2, 1)], False, False),
        ([(0.1 + 0.2, 1), (0.3, 2)], [(0.3, 1), (0.1 + 0.2, 2)], False, True),
        ([], [], False, True),
    ],
)
def test_same_result(got: sql_sandbox.Result, wanted: sql_sandbox.Result, ordered: bool, same: bool) -> None:
    assert same_result(got, wanted, ordered=ordered) is same


def test_case_can_be_ignored() -> None:
    assert same_result([("A",)], [("a",)], ignore_case=True)


@given(st.lists(st.tuples(st.sampled_from(["x", "y", 1, 2.5, None]), st.integers(0, 3)), max_size=8), st.randoms())
def test_any_order_of_the_same_rows_is_the_same(rows: sql_sandbox.Result, random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert same_result(shuffled, rows)
    assert not same_result([*shuffled, ("z", 0)], rows)
    if rows:
        assert not same_result([*shuffled[1:], ("z", 0)], rows)


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order   by a limit 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'x ORDER BY y' FROM t", False),
        ('SELECT "order by" FROM t -- ORDER BY a', False),
        ("SELECT a FROM t /* ORDER BY a */", False),
        ("SELECT ')' , a FROM t ORDER BY a", True),
        ("SELECT reorder by_ FROM t", False),
    ],
)
def test_is_ordered(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered
