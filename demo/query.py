"""A question's meaning, and the one SQL text that says it.

One style throughout, so that a small model can learn it: keywords in capitals, the table asked about first, each
table's alias its first letter and only where tables are joined, every join written `child.parent_id = parent.id`,
conditions in the order in which the question names them, DISTINCT wherever a join could repeat a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

PARENTS = {
    "employees": {"departments": "department_id"},
    "assignments": {"employees": "employee_id", "projects": "project_id"},
    "orders": {"customers": "customer_id", "employees": "employee_id"},
}
"""Child table -> parent table -> the child's column that points to it. Without direction it is a tree."""

Value = int | str


@dataclass(frozen=True)
class Condition:
    """`column op value`, the column written `table.column`; BETWEEN has two values, the others one."""

    column: str
    op: str
    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked, apart from its words."""

    table: str
    """What the question is about; first in FROM."""
    columns: tuple[str, ...] = ()
    """What to show, as `table.column`, where there is no function."""
    function: str = ""
    """COUNT, SUM, AVG, MIN or MAX."""
    measure: str = ""
    """The function's column; none for a count of rows."""
    distinct: bool = False
    """Different values of the column only."""
    where: tuple[Condition, ...] = ()
    group: str = ""
    """The column to group by."""
    having: tuple[str, Value] | None = None
    """Operator and bound on the function's value in each group."""
    order: str = ""
    """Column to sort by; "function" for the function's value in each group; none for no order."""
    descending: bool = True
    limit: Value = 0
    """Rows to keep; 0 for all."""
    through: tuple[str, ...] = ()
    """Tables to join although none of their columns is used."""

    def tables(self) -> list[str]:
        """The tables of FROM in their order."""
        used = [self.table, *(t for t in self.through if t != self.table)]
        columns = [*self.columns, self.measure, self.group, self.order, *(c.column for c in self.where)]
        for column in columns:
            if "." in column:
                used += [t for t in path(self.table, column.split(".")[0]) if t not in used]
        return used

    def repeats(self) -> bool:
        """Whether a join can show a row of `table` more than once: some step goes from a parent to its children."""
        tables = self.tables()
        return any(step in PARENTS.get(t, {}) for t in tables[1:] for step in path(self.table, t)[:-1])

    def sql(self) -> str:
        """The text."""
        parts = [f"SELECT {self._shown()} FROM {self._from()}"]
        if self.where:
            parts.append("WHERE " + " AND ".join(self._condition(c) for c in self.where))
        if self.group:
            parts.append(f"GROUP BY {self._name(self.group)}")
        if self.having:
            parts.append(f"HAVING {self._function()} {self.having[0]} {self.having[1]}")
        if self.order:
            key = self._function() if self.order == "function" else self._name(self.order)
            parts.append(f"ORDER BY {key}{' DESC' if self.descending else ''}")
        if self.limit:
            parts.append(f"LIMIT {self.limit}")
        return " ".join(parts)

    def composition(self) -> str:
        """The text without its constants and without the order of its conditions; LIMIT 1 is no constant."""
        where = sorted((replace(c, values=("?",) * len(c.values)) for c in self.where), key=lambda c: (c.column, c.op))
        having = (self.having[0], "?") if self.having else None
        return replace(
            self, where=tuple(where), having=having, limit="?" if self.limit not in (0, 1) else self.limit
        ).sql()

    def weaker(self) -> Iterator["Query"]:
        """The queries that leave out one condition, with and without its join, or one bound.

        A good question's answer differs from all of theirs.
        """
        for place in range(len(self.where)):
            rest = replace(self, where=self.where[:place] + self.where[place + 1 :])
            yield rest
            if len(rest.tables()) < len(self.tables()):
                yield replace(rest, through=tuple(self.tables()))
        if self.having:
            yield replace(self, having=(">", -1))  # every group, shown as before
        if self.limit:
            yield replace(self, limit=0)
            yield replace(self, descending=not self.descending)

    def _name(self, column: str) -> str:
        table, name = column.split(".")
        return name if len(self.tables()) == 1 else f"{table[0]}.{name}"

    def _function(self) -> str:
        if self.measure:
            return f"{self.function}({'DISTINCT ' if self.distinct else ''}{self._name(self.measure)})"
        return f"COUNT(DISTINCT {self.table[0]}.id)" if self.repeats() else "COUNT(*)"

    def _shown(self) -> str:
        if self.group:
            group = self._name(self.group)
            return group if self.having or self.order else f"{group}, {self._function()}"
        if self.function:
            return self._function()
        distinct = "DISTINCT " if self.distinct or self.repeats() else ""
        return distinct + ", ".join(self._name(c) for c in self.columns)

    def _from(self) -> str:
        tables = self.tables()
        if len(tables) == 1:
            return self.table
        text = f"{self.table} {self.table[0]}"
        for table in tables[1:]:
            near = path(self.table, table)[-2]
            child, parent = (near, table) if table in PARENTS.get(near, {}) else (table, near)
            text += f" JOIN {table} {table[0]} ON {child[0]}.{PARENTS[child][parent]} = {parent[0]}.id"
        return text

    def _condition(self, condition: Condition) -> str:
        texts = [_literal(v) for v in condition.values]
        return f"{self._name(condition.column)} {condition.op} {' AND '.join(texts)}"


@cache
def path(start: str, end: str) -> tuple[str, ...]:
    """The tables on the way from `start` to `end`, both included."""
    ways: list[tuple[str, ...]] = [(start,)]
    for way in ways:
        if way[-1] == end:
            return way
        ways += [(*way, t) for t in sorted(_neighbors(way[-1])) if t not in way]
    raise KeyError(end)


def _neighbors(table: str) -> set[str]:
    return set(PARENTS.get(table, {})) | {child for child, parents in PARENTS.items() if table in parents}


def _literal(value: Value) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
