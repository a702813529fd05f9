"""Constants for a condition: as its question writes them and as its SQL does."""

from random import Random

from demo import values
from demo.phrases import Filter
from demo.query import Value
from demo.values import pick, reserved, shuffled

WORDS = {
    "employees.city": values.CITIES + values.HELD_OUT_CITIES,
    "customers.city": values.CITIES + values.HELD_OUT_CITIES,
    "employees.title": values.TITLES + values.HELD_OUT_TITLES,
    "departments.name": values.DEPARTMENTS + values.HELD_OUT_DEPARTMENTS,
    "customers.industry": values.INDUSTRIES + values.HELD_OUT_INDUSTRIES,
    "orders.status": values.ORDER_STATUSES + values.HELD_OUT_ORDER_STATUSES,
    "projects.status": values.PROJECT_STATUSES + values.HELD_OUT_PROJECT_STATUSES,
    "projects.name": values.PROJECTS,
    "customers.name": values.CUSTOMERS,
}
NUMBERS = {
    "employees.salary": range(38_000, 95_000, 500),
    "departments.budget": range(180_000, 880_000, 10_000),
    "projects.budget": range(30_000, 390_000, 5_000),
    "orders.amount": range(300, 9_600, 50),
    "orders.id": range(1, 461),
    "assignments.hours": range(15, 125),
}
YEARS = {
    "employees.hire_date": range(2014, 2025),
    "orders.order_date": range(2016, 2025),
    "projects.start_date": range(2015, 2025),
}
GROUP_NUMBERS = {
    "COUNT": range(2, 60),
    "AVG employees.salary": range(50_000, 80_000, 500),
    "AVG orders.amount": range(3_500, 6_500, 50),
    "SUM orders.amount": range(10_000, 250_000, 1_000),
    "SUM assignments.hours": range(100, 1_200, 10),
}
"""Bounds on a function's value in a group."""
TOP_NUMBERS = range(2, 13)
"""How many rows a question about the top rows asks for."""


def constants(f: Filter, names: list[str], rng: Random, held_out: bool) -> tuple[tuple[str, ...], tuple[Value, ...]]:
    """One or two constants for a condition: their texts in the question, their values in SQL.

    `names` are the employees of the database.  All are held-out constants, or none is.
    """
    if f.dated:
        return _dates(f, rng, held_out)
    if f.column in NUMBERS:
        found = sorted(shuffled(rng, allowed(NUMBERS[f.column], held_out))[: 2 if f.op == "between" else 1])
        return tuple(map(str, found)), tuple(found)
    words = names if f.column == "employees.name" else WORDS[f.column]
    word = pick(rng, [w for w in words if reserved(w) == held_out])
    return (word,), (word,)


def number(numbers: range, rng: Random, held_out: bool) -> int:
    """One of the numbers that such a question may name."""
    return pick(rng, allowed(numbers, held_out))


def allowed(numbers: range, held_out: bool) -> list[int]:
    """The numbers that held-out questions may name, or those that training questions may."""
    return [n for n in numbers if reserved(str(n)) == held_out]


def _dates(f: Filter, rng: Random, held_out: bool) -> tuple[tuple[str, ...], tuple[Value, ...]]:
    years = [y for y in YEARS[f.column] if reserved(str(y)) == held_out]
    year, month = pick(rng, years), 1 + int(12 * rng.random())
    if f.op == "year":
        return (str(year),), (f"{year}%",)
    if f.op == "month":
        return (f"{values.MONTHS[month - 1]} {year}",), (f"{year}-{month:02}%",)
    days = [f"{pick(rng, years)}-{1 + int(12 * rng.random()):02}-{1 + int(28 * rng.random()):02}" for _ in range(2)]
    days = sorted(days) if f.op == "between" else days[:1]
    return tuple(days), tuple(days)
