"""What became of the rows, counted; and one message for all that cannot be used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from veneer.data.example import Example, Made, TooLong
from veneer.data.row_schema import Layout
from veneer.data.sources import Row
from veneer.errors import DataError, listed

SHOWN = 8  # lines or reasons named in one message


@dataclass(frozen=True)
class RenderReport:
    """What became of the rows; lengths are tokens of an example."""

    rows: int
    examples: int
    dropped: int
    """Rows too long, left out."""
    truncated: int
    """Rows too long, whose prompt lost its beginning."""
    split: int
    """Running texts too long, cut into several examples."""
    tokens: int
    supervised: int
    """Tokens that are trained targets."""
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    layouts: dict[str, int]
    """How rows were read -> how many."""
    unused: tuple[str, ...]
    """Columns that no layout reads."""
    dropped_lines: tuple[int, ...]
    """Lines of the first rows dropped."""


@dataclass(frozen=True)
class Rendered:
    """All examples, in the order of the rows, and what became of the others."""

    examples: list[Example]
    report: RenderReport


def reported(
    rows: Sequence[Row], made: Sequence[Made | TooLong], layouts: Mapping[tuple[str, ...], Layout], max_length: int
) -> Rendered:
    """Gather and count.  Raises DataError if no example is left."""
    dropped = [m for m in made if isinstance(m, TooLong)]
    kept = [m for m in made if isinstance(m, Made)]
    examples = [piece for m in kept for piece in m.pieces]
    if not examples:
        raise DataError(_none_left(rows, dropped, max_length))
    lengths = np.array([len(e) for e in examples])
    p50, p90, p99, longest = (int(v) for v in np.percentile(lengths, [50, 90, 99, 100], method="higher"))
    by_columns = Counter(tuple(row.columns) for row in rows)
    read: Counter[str] = Counter()
    for columns, count in by_columns.items():
        read[layouts[columns].name] += count
    report = RenderReport(
        rows=len(rows),
        examples=len(examples),
        dropped=len(dropped),
        truncated=sum(m.truncated for m in kept),
        split=sum(m.split for m in kept),
        tokens=int(lengths.sum()),
        supervised=sum(int(e.supervised.sum()) for e in examples),
        length_p50=p50,
        length_p90=p90,
        length_p99=p99,
        length_max=longest,
        layouts=dict(read),
        unused=tuple(sorted({name for columns in by_columns for name in set(columns) - layouts[columns].used})),
        dropped_lines=tuple(d.line for d in dropped[:SHOWN]),
    )
    return Rendered(examples, report)


def _none_left(rows: Sequence[Row], dropped: Sequence[TooLong], max_length: int) -> str:
    if not rows:
        return "there are no rows to train on"
    return (
        f"{rows[0].source}: none of the {len(rows)} rows fits into max_length = {max_length} tokens (the shortest has "
        f"{min(d.length for d in dropped)}). Raise train.max_length; data.too_long: truncate cuts prompts to fit."
    )


def complaint(unusable: Sequence[tuple[Row, str]], total: int) -> str:
    """One message of all unusable rows, those of one reason together."""
    reasons: dict[str, list[int]] = {}
    for row, reason in unusable:
        reasons.setdefault(reason, []).append(row.line)
    problems = [
        f"line{'s' * (len(lines) > 1)} {listed(list(map(str, lines)), SHOWN, ', ')}: {reason}"
        for reason, lines in reasons.items()
    ]
    head = f"{unusable[0][0].source}: {len(unusable)} of {total} rows cannot be trained on"
    advice = "Correct or remove them, or say in the recipe how to read them."
    return f"{head}\n{listed(problems, SHOWN)}\n{advice}"
