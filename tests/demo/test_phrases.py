from contextlib import closing

from demo.database import database_in_memory
from demo.phrases import FILTERS, NOUNS


def test_every_filter_names_a_column_of_the_database_once() -> None:
    with closing(database_in_memory()) as connection:
        for f in FILTERS:
            table, column = f.column.split(".")
            connection.execute(f"SELECT {column} FROM {table}")
    assert len({(f.table, f.column, f.op) for f in FILTERS}) == len(FILTERS)
    assert {f.op for f in FILTERS} == {"=", "!=", ">", "<", "between", "year", "month"}


def test_held_out_phrases_are_no_training_phrases_and_every_constant_has_its_place() -> None:
    for f in FILTERS:
        assert f.seen and f.held, f
        assert not {p.lstrip("+~") for p in f.seen} & {p.lstrip("+~") for p in f.held}, f
        for phrase in f.seen + f.held:
            assert phrase.count("{}") == (2 if f.op == "between" else 1), phrase
            assert phrase == phrase.strip() and "  " not in phrase and "|" not in phrase


def test_a_date_is_said_in_five_ways() -> None:
    said = {f.op: f.seen[0] for f in FILTERS if (f.table, f.column) == ("employees", "employees.hire_date")}
    assert said == {
        ">": "hired after {}",
        "<": "hired before {}",
        "between": "hired between {} and {}",
        "year": "hired in {}",
        "month": "hired in {}",
    }


def test_held_out_nouns_are_not_seen() -> None:
    for noun in NOUNS.values():
        assert not set(noun.many) & set(noun.held)
