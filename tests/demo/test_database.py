import sqlite3
from contextlib import closing

import pytest

from demo.database import database_in_memory, database_sql


def test_the_same_seed_writes_the_same_company_and_another_seed_another() -> None:
    assert database_sql(0) == database_sql(0) != database_sql(1)


def test_the_script_makes_what_sqlite_dumps_back() -> None:
    with closing(database_in_memory(1)) as connection, closing(sqlite3.connect(":memory:")) as other:
        other.executescript("\n".join(connection.iterdump()))
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            rows = f"SELECT * FROM {table} ORDER BY 1, 2"
            assert other.execute(rows).fetchall() == connection.execute(rows).fetchall() != []


def test_keys_hold_and_tables_are_small() -> None:
    with closing(database_in_memory()) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        counts = {}
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            counts[table] = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
    assert counts == {
        "departments": 10,
        "employees": 160,
        "projects": 28,
        "assignments": 320,
        "customers": 40,
        "orders": 460,
    }


@pytest.mark.parametrize(
    "column",
    [
        "employees.salary",
        "employees.hire_date",
        "orders.amount",
        "orders.order_date",
        "projects.budget",
        "projects.start_date",
        "departments.budget",
    ],
)
def test_columns_to_sort_by_have_no_equal_values(column: str) -> None:
    table, name = column.split(".")
    with closing(database_in_memory()) as connection:
        every, different = connection.execute(f"SELECT COUNT({name}), COUNT(DISTINCT {name}) FROM {table}").fetchone()
    assert every == different > 0
