from demo.phrases import FILTERS, Filter
from demo.plans import KINDS, plans, reach, upward


def named(table: str, column: str) -> Filter:
    return next(f for f in FILTERS if (f.table, f.column) == (table, column))


def test_every_kind_has_plans_in_every_family() -> None:
    assert tuple(plans()) == KINDS
    assert all(family for families in plans().values() for family in families)


def test_single_parts_are_never_held_out_and_combinations_are_in_every_other_kind() -> None:
    for kind, families in plans().items():
        every = [plan for family in families for plan in family]
        held = [plan for plan in every if plan.reserved()]
        assert len(held) < len(every) / 2
        assert bool(held) == (kind != "filter")
        for plan in held:
            assert len(plan.filters) > 1 or plan.query.function or plan.query.order or plan.query.distinct


def test_kinds_are_what_they_are_called() -> None:
    def queries(kind: str) -> list[str]:
        return [plan.query.sql() for family in plans()[kind] for plan in family]

    assert all(" JOIN " not in sql for sql in queries("filter") + queries("two filters"))
    assert all(sql.count(" JOIN ") == 1 for sql in queries("join"))
    assert all(sql.count(" JOIN ") == 2 for sql in queries("three tables"))
    assert all(" GROUP BY " in sql for sql in queries("group"))
    assert all(" LIMIT " in sql for sql in queries("top"))
    assert all("_date" in sql for sql in queries("date"))
    assert all("!=" in sql for sql in queries("negation"))
    assert all("DISTINCT" in sql for sql in queries("distinct"))
    assert all(sql.startswith(("SELECT COUNT", "SELECT AVG", "SELECT SUM", "SELECT M")) for sql in queries("aggregate"))


def test_reach_and_upward() -> None:
    assert reach(named("employees", "employees.city")) == 1
    assert reach(named("employees", "projects.name")) == 3
    assert upward(named("employees", "departments.name"))
    assert not upward(named("departments", "employees.city"))
