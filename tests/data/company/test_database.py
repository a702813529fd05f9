import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from veneer.data.company import make_database
from veneer.data.company.database import database_in_memory
from veneer.errors import DiskError


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def test_the_same_seed_writes_the_same_company_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_database(tmp_path / name, seed)
    assert dump(tmp_path / "a") == dump(tmp_path / "b") != dump(tmp_path / "c")
    with closing(database_in_memory(1)) as connection:
        assert list(connection.iterdump()) == dump(tmp_path / "c")


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "company.sqlite").write_text("not a database")
    make_database(tmp_path / "company.sqlite")
    assert [p.name for p in tmp_path.iterdir()] == ["company.sqlite"]
    assert dump(tmp_path / "company.sqlite")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "company.sqlite").mkdir()
    with pytest.raises(DiskError, match=r"company\.sqlite was not written"):
        make_database(tmp_path / "company.sqlite")


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
