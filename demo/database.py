"""The demo's company: six tables as SQL, the same text for the same seed."""

import sqlite3
from collections.abc import Sequence
from datetime import date, timedelta
from random import Random

from demo import values
from demo.values import pick, shuffled

SCHEMA = """
CREATE TABLE departments (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, budget INTEGER NOT NULL);
CREATE TABLE employees (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, title TEXT NOT NULL, city TEXT NOT NULL, salary INTEGER NOT NULL,
  hire_date TEXT NOT NULL, department_id INTEGER NOT NULL REFERENCES departments (id));
CREATE TABLE projects (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, budget INTEGER NOT NULL, start_date TEXT NOT NULL,
  status TEXT NOT NULL);
CREATE TABLE assignments (
  employee_id INTEGER NOT NULL REFERENCES employees (id), project_id INTEGER NOT NULL REFERENCES projects (id),
  hours INTEGER NOT NULL, PRIMARY KEY (employee_id, project_id));
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, city TEXT NOT NULL, industry TEXT NOT NULL);
CREATE TABLE orders (
  id INTEGER PRIMARY KEY, customer_id INTEGER NOT NULL REFERENCES customers (id),
  employee_id INTEGER NOT NULL REFERENCES employees (id), order_date TEXT NOT NULL, amount INTEGER NOT NULL,
  status TEXT NOT NULL);
"""

EMPLOYEES, ASSIGNMENTS, ORDERS, SELLERS = 160, 320, 460, 40
"""Rows of three tables, and how many employees handle orders."""

Row = tuple[int | str, ...]


def database_sql(seed: int = 0) -> str:
    """The company as a script of SQL: the tables, then an INSERT per row."""
    inserts = [
        f"INSERT INTO {table} VALUES ({', '.join(map(_literal, row))});\n"
        for table, rows in _rows(seed).items()
        for row in rows
    ]
    return f"BEGIN;\n{SCHEMA.strip()}\n{''.join(inserts)}COMMIT;\n"


def database_in_memory(seed: int = 0) -> sqlite3.Connection:
    """The same company in memory; the caller closes it."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(database_sql(seed))
    return connection


def _literal(value: int | str) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def _rows(seed: int) -> dict[str, list[Row]]:
    rng = Random(f"company {seed}")
    departments = values.DEPARTMENTS + values.HELD_OUT_DEPARTMENTS
    budgets = _distinct(rng, range(150_000, 900_000, 1_000), len(departments))
    return {
        "departments": [(i + 1, name, budgets[i]) for i, name in enumerate(departments)],
        "employees": _employees(rng, len(departments)),
        "projects": _projects(rng),
        "assignments": _assignments(rng),
        "customers": _customers(rng),
        "orders": _orders(rng),
    }


def _employees(rng: Random, departments: int) -> list[Row]:
    names = [f"{first} {last}" for first in values.FIRST_NAMES for last in values.LAST_NAMES]
    names = shuffled(rng, names)[:EMPLOYEES]
    salaries = _distinct(rng, range(34_000, 98_000, 100), EMPLOYEES)
    hired = _dates(rng, 2014, 2024, EMPLOYEES)
    cities, titles = values.CITIES + values.HELD_OUT_CITIES, values.TITLES + values.HELD_OUT_TITLES
    sizes = [d for d in range(departments) for _ in range(5 + 2 * d)]  # departments of clearly different sizes
    order = shuffled(rng, range(departments))
    return [
        (i + 1, names[i], pick(rng, titles), pick(rng, cities), salaries[i], hired[i], order[pick(rng, sizes)] + 1)
        for i in range(EMPLOYEES)
    ]


def _projects(rng: Random) -> list[Row]:
    names, statuses = values.PROJECTS, values.PROJECT_STATUSES + values.HELD_OUT_PROJECT_STATUSES
    budgets = _distinct(rng, range(20_000, 400_000, 1_000), len(names))
    starts = _dates(rng, 2015, 2024, len(names))
    return [(i + 1, name, budgets[i], starts[i], pick(rng, statuses)) for i, name in enumerate(names)]


def _assignments(rng: Random) -> list[Row]:
    pairs = [(e + 1, p + 1) for e in range(EMPLOYEES) for p in range(len(values.PROJECTS))]
    chosen = sorted(shuffled(rng, pairs)[:ASSIGNMENTS])
    return [(employee, project, 8 + int(rng.random() * 120)) for employee, project in chosen]


def _customers(rng: Random) -> list[Row]:
    cities, industries = values.CITIES + values.HELD_OUT_CITIES, values.INDUSTRIES + values.HELD_OUT_INDUSTRIES
    return [(i + 1, name, pick(rng, cities), pick(rng, industries)) for i, name in enumerate(values.CUSTOMERS)]


def _orders(rng: Random) -> list[Row]:
    sellers = shuffled(rng, range(1, EMPLOYEES + 1))[:SELLERS]
    dates = sorted(_dates(rng, 2016, 2024, ORDERS))
    amounts = _distinct(rng, range(120, 9_900, 10), ORDERS)
    statuses = values.ORDER_STATUSES + values.HELD_OUT_ORDER_STATUSES
    customers = len(values.CUSTOMERS)
    return [
        (i + 1, 1 + int(customers * rng.random() ** 1.5), pick(rng, sellers), dates[i], amounts[i], pick(rng, statuses))
        for i in range(ORDERS)
    ]


def _distinct(rng: Random, numbers: Sequence[int], count: int) -> list[int]:
    return shuffled(rng, numbers)[:count]


def _dates(rng: Random, first_year: int, last_year: int, count: int) -> list[str]:
    first, last = date(first_year, 1, 1), date(last_year, 12, 31)
    return [(first + timedelta(d)).isoformat() for d in _distinct(rng, range((last - first).days + 1), count)]
