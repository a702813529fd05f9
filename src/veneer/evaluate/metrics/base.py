"""What a metric is: answers and what they should be -> values for all rows, and one for each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, DataError
from veneer.registry import Registry

Columns = Sequence[Mapping[str, Any]]
"""The columns of each row."""


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """What some metrics can be told."""

    ignore_case: bool = False
    """Compare letters regardless of case: exact_match, accuracy, f1, and text in SQL results."""
    positive: str | None = None
    """f1: the label whose own F1 is reported too."""
    database: Path | None = None
    """sql: the SQLite file that all rows ask; without it each row brings `database`, or `schema` and `rows`."""
    seconds: float = 5.0
    """sql: most time for one query, above 0."""


@dataclass(frozen=True)
class Scores:
    """One metric's result."""

    values: dict[str, float]
    """By name; the first is the metric's own."""
    rows: list[float | None]
    """Each row's own score; None where the metric has none for single rows."""


Metric = Callable[[Sequence[str], Sequence[Any], Columns, MetricOptions], Scores]
"""(predictions as generated, for each its reference: a text, a number, or a list of equally right ones, the rows'
columns, options) -> scores.  Raises DataError for references it cannot use, ConfigError for a library that is not
installed."""
METRICS: Registry[Metric] = Registry("metric")


def mean(name: str, rows: Sequence[float]) -> Scores:
    """Scores whose value is the mean of the rows' own."""
    return Scores({name: sum(rows) / len(rows) if rows else 0.0}, list(rows))


def alternatives(reference: Any) -> list[str]:
    """A reference as the texts that are all right.  Raises DataError for an empty list."""
    many = list(reference) if isinstance(reference, list | tuple) else [reference]
    if not many:
        raise DataError("a reference is an empty list; each row needs at least one right answer")
    return [str(r) for r in many]


def plain(text: str, ignore_case: bool = False) -> str:
    """Text with runs of white space as one space, none at the ends, and in one case if asked."""
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text


def missing_library(metric: str, library: str) -> ConfigError:
    """The error for a metric whose library is not there."""
    return ConfigError(f"metric {metric} needs {library}, which is not installed: pip install 'veneer[metrics]'")
