"""What can be asked: every combination of sentence, table, conditions and columns, and which of them are held out."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations

from demo.frames import Words
from demo.phrases import FILTERS, Filter
from demo.query import Condition, Query, path
from demo.vocabulary import (
    ABOVE,
    BEST,
    DATE_FUNCTIONS,
    DATE_MOST,
    EXTRAS,
    FUNCTIONS,
    GROUPS,
    LOOKUPS,
    MEASURES,
    MORE,
    MOST,
    SHOWN,
)

KINDS = (
    "filter",
    "two filters",
    "join",
    "three tables",
    "aggregate",
    "group",
    "top",
    "date",
    "negation",
    "distinct",
)


@dataclass(frozen=True, eq=False)
class Plan:
    """A question to be filled with words and constants."""

    frame: str
    """Its sentences, in FRAMES."""
    query: Query
    """Its meaning; each constant is "?"."""
    filters: tuple[Filter, ...] = ()
    words: dict[str, Words] = field(default_factory=dict)
    """Slot -> ways to fill it."""
    own: Words = field(default_factory=lambda: Words(()))
    """Sentences beside those of the frame."""

    @property
    def open(self) -> bool:
        """Whether it has a constant, so that its SQL can be new."""
        return "?" in self.query.composition()

    def reserved(self) -> bool:
        """Whether only held-out questions combine these parts; never so for a single part, and else for one in six."""
        q = self.query
        parts = len(self.filters) + sum(map(bool, (q.function, q.group, q.order, q.distinct)))
        return parts > 1 and zlib.crc32(q.composition().encode()) % 6 == 0


def reach(f: Filter) -> int:
    """How many tables the condition needs."""
    return len(path(f.table, f.column.split(".")[0]))


def upward(f: Filter) -> bool:
    """Whether the condition's join leaves each row of the filter's table single."""
    return not _query(f.table, (f,)).repeats()


@lru_cache(maxsize=1)
def plans() -> dict[str, list[list[Plan]]]:
    """Kind of question -> families of plans; families are drawn equally often, and plans within a family."""
    return {
        "filter": [_lists(_local(1)), _lists(_local(1), extras=True), list(_lookups(1))],
        "two filters": [_lists(_local(2)), _lists(_local(2), extras=True)],
        "join": [
            *[_lists(_joined(2, 1))] * 2,
            _lists(_joined(2, 2)),
            _counts(_joined(2, 1)),
            list(_lookups(2)),
        ],
        "three tables": [
            *[_lists(_joined(3, 1))] * 2,
            _lists(_joined(3, 2)),
            _counts(_joined(3, 1)),
            list(_two_parents()),
            [*_lookups(3), *_hours()],
        ],
        "aggregate": [
            _counts(_local(1)),
            _counts(_local(2)),
            list(_aggregates(0)),
            list(_aggregates(1)),
            list(_sums()),
        ],
        "group": [list(_groups(0)), list(_groups(1)), list(_having())],
        "top": [list(_tops(0)), list(_tops(1)), list(_top_groups(0)), list(_top_groups(1))],
        "date": [_lists(_dated(1)), _lists(_dated(1), extras=True), _counts(_dated(1)), _lists(_dated(2))],
        "negation": [_lists(_negated(1)), _counts(_negated(1)), _lists(_negated(2))],
        "distinct": [list(_different("")), list(_different("COUNT"))],
    }


def _query(table: str, filters: tuple[Filter, ...], **parts: object) -> Query:
    ops = {"year": "LIKE", "month": "LIKE", "between": "BETWEEN"}
    where = tuple(Condition(f.column, ops.get(f.op, f.op), ("?",) * (2 if f.op == "between" else 1)) for f in filters)
    return replace(Query(table=table, where=where), **parts)  # type: ignore[arg-type]


Choice = tuple[Filter, ...]


def _pairs(first: list[Filter], second: list[Filter]) -> list[Choice]:
    """Two conditions on different columns of one table."""
    return [(a, b) for a in first for b in second if a.table == b.table and a.column != b.column]


def _plain(table: str = "") -> list[Filter]:
    """Conditions on the table's own columns, without dates and negations."""
    return [f for f in FILTERS if reach(f) == 1 and f.op != "!=" and not f.dated and table in ("", f.table)]


def _local(count: int) -> list[Choice]:
    if count == 1:
        return [(f,) for f in _plain()]
    short = [f for f in FILTERS if reach(f) == 1 and f.op != "!=" and not (f.dated and f.op == "between")]
    pairs = combinations(short, 2)
    return [(a, b) for a, b in pairs if a.table == b.table and a.column != b.column]


def _joined(tables: int, count: int) -> list[Choice]:
    far = [f for f in FILTERS if reach(f) == tables and f.op != "!=" and f.table in SHOWN]
    return [(f,) for f in far] if count == 1 else _pairs(_plain(), far)


def _dated(count: int) -> list[Choice]:
    dates = [f for f in FILTERS if f.dated and f.table in SHOWN]
    if count == 1:
        return [(f,) for f in dates]
    return _pairs([f for f in _plain() if f.op == "="], [f for f in dates if reach(f) == 1])


def _negated(count: int) -> list[Choice]:
    negations = [f for f in FILTERS if f.op == "!="]
    return [(f,) for f in negations] if count == 1 else _pairs(_plain(), negations)


def _lists(choices: list[Choice], extras: bool = False) -> list[Plan]:
    found = []
    for filters in choices:
        table = filters[0].table
        if not extras:
            found.append(Plan("list", _query(table, filters, columns=(SHOWN[table],)), filters))
            continue
        if any(reach(f) > 1 for f in filters):
            continue
        for column, word in EXTRAS.get(table, {}).items():
            query = _query(table, filters, columns=(SHOWN[table], f"{table}.{column}"))
            if all(f.column != f"{table}.{column}" or f.op != "=" for f in filters):
                found.append(Plan("list with attribute", query, filters, {"extra": Words((word,))}))
    return found


def _counts(choices: list[Choice]) -> list[Plan]:
    return [Plan("count", _query(filters[0].table, filters, function="COUNT"), filters) for filters in choices]


def _lookups(tables: int) -> Iterator[Plan]:
    for key, form, column, word, own in LOOKUPS:
        named = Filter(key.split(".")[0], key, "=", (form,), (form,))
        if len(path(named.table, column.split(".")[0])) == tables:
            query = _query(named.table, (named,), columns=(column,))
            yield Plan("look up" if word else "handler", query, (named,), {"m": Words((word,))}, own)


def _hours() -> Iterator[Plan]:
    named = tuple(Filter("assignments", c, "=", ("{}",), ("{}",)) for c in ("employees.name", "projects.name"))
    yield Plan("hours", _query("assignments", named, columns=("assignments.hours",)), named)


def _two_parents() -> Iterator[Plan]:
    """Orders narrowed down by their customer and by their employee."""
    near = [f for f in FILTERS if f.table == "orders" and reach(f) == 2 and f.op == "="]
    customers = [f for f in near if f.column.startswith("customers")]
    for filters in _pairs(customers, [f for f in near if f.column.startswith("employees")]):
        yield Plan("list", _query("orders", filters, columns=("orders.id",)), filters)
        yield Plan("count", _query("orders", filters, function="COUNT"), filters)


def _aggregates(count: int) -> Iterator[Plan]:
    """A function of a table's own column, over all rows or those of one condition that repeats none of them."""
    for measure, word in MEASURES.items():
        table = measure.split(".")[0]
        functions = DATE_FUNCTIONS if measure.endswith("_date") else FUNCTIONS
        near = [
            f
            for f in FILTERS
            if f.table == table and f.column != measure and f.op not in ("!=", "between") and upward(f)
        ]
        for function, said in functions.items():
            for filters in [(f,) for f in near] if count else [()]:
                query = _query(table, filters, function=function, measure=measure)
                if table != "assignments":
                    yield Plan("aggregate", query, filters, {"f": said, "m": Words((word,))})


def _sums() -> Iterator[Plan]:
    """Hours of assignments."""
    for f in (f for f in FILTERS if f.table == "assignments"):
        for function in FUNCTIONS:
            query = _query(f.table, (f,), function=function, measure="assignments.hours")
            yield Plan("aggregate", query, (f,), {"f": FUNCTIONS[function], "m": Words(("number of hours",))})


def _measured(table: str) -> list[tuple[str, str, Words]]:
    """Function, column and the function's words, for what is counted or averaged in groups of a table's rows."""
    measures = {"employees": "employees.salary", "orders": "orders.amount", "assignments": "assignments.hours"}
    counted = [] if table == "assignments" else [("COUNT", "", Words(()))]
    if table not in measures:
        return counted
    return counted + [(f, measures[table], FUNCTIONS[f]) for f in FUNCTIONS]


def _grouped(count: int) -> Iterator[tuple[Query, Choice, dict[str, Words]]]:
    """Functions in groups, over all rows or those of one plain condition or date on the table itself."""
    for table, groups in GROUPS.items():
        near = [f for f in FILTERS if f.table == table and reach(f) == 1 and f.op in ("=", ">", "year")]
        for group, (one, many) in groups.items():
            for function, measure, said in _measured(table):
                for filters in [(f,) for f in near if f.column not in (group, measure)] if count else [()]:
                    words = {"g": Words((one,)), "gs": Words((many,)), "f": said}
                    words["m"] = Words((MEASURES.get(measure, ""),))
                    yield _query(table, filters, function=function, measure=measure, group=group), filters, words


def _groups(count: int) -> Iterator[Plan]:
    for query, filters, words in _grouped(count):
        yield Plan("aggregate per group" if query.measure else "count per group", query, filters, words)


def _having() -> Iterator[Plan]:
    values = {
        ("AVG", "employees.salary"): "an average salary",
        ("AVG", "orders.amount"): "an average order amount",
        ("SUM", "orders.amount"): "a total order amount",
        ("SUM", "assignments.hours"): "a total number of hours",
    }
    for query, filters, words in _grouped(0):
        for op in "><":
            asked = replace(query, having=(op, "?"))
            if not query.measure:
                yield Plan("groups by count", asked, filters, {**words, "more": MORE[op]})
            elif value := values.get((query.function, query.measure)):
                yield Plan(
                    "groups by aggregate", asked, filters, {**words, "value": Words((value,)), "above": ABOVE[op]}
                )


def _tops(count: int) -> Iterator[Plan]:
    for measure, word in MEASURES.items():
        table = measure.split(".")[0]
        if table not in SHOWN or (table == "departments" and count):
            continue
        near = [f for f in FILTERS if f.table == table and f.column != measure and f.op in ("=", "year") and upward(f)]
        for descending in (True, False):
            most = (DATE_MOST if measure.endswith("_date") else MOST)[descending]
            words = {"m": Words((word,)), "most": most, "best": BEST.get((measure, descending), Words(()))}
            for filters in [(f,) for f in near] if count else [()]:
                query = _query(table, filters, columns=(SHOWN[table],), order=measure, descending=descending)
                for name in ("top", "top by value"):
                    if name == "top by value" or words["best"].seen:
                        one = "top one" if name == "top" else "top one by value"
                        yield Plan(name, replace(query, limit="?"), filters, words)
                        yield Plan(one, replace(query, limit=1), filters, words)


def _top_groups(count: int) -> Iterator[Plan]:
    for query, filters, words in _grouped(count):
        usual = {"employees": "AVG", "orders": "SUM", "assignments": "SUM"}
        if query.measure and query.function != usual[query.table]:
            continue
        name = "aggregate" if query.measure else "count"
        for descending in (True, False) if query.measure else (True,):
            said = {**words, "most": MOST[descending]}
            ordered = replace(query, order="function", descending=descending)
            yield Plan(f"top groups by {name}", replace(ordered, limit="?"), filters, said)
            yield Plan(f"top group by {name}", replace(ordered, limit=1), filters, said)


def _different(function: str) -> Iterator[Plan]:
    for table, groups in GROUPS.items():
        for column, (one, many) in groups.items():
            if not column.startswith(table):
                continue
            words = {"g": Words((one,)), "gs": Words((many,))}
            for f in (f for f in FILTERS if f.table == table and f.column != column and f.op in ("=", "year")):
                shown = {"function": function, "measure": column} if function else {"columns": (column,)}
                yield Plan(
                    "count different" if function else "different",
                    _query(table, (f,), distinct=True, **shown),
                    (f,),
                    words,
                )
