"""What will be trained, for people: rows with their trained tokens marked, a histogram of lengths, totals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from veneer.data.example import Example
from veneer.data.render import Rendered
from veneer.data.stats import SHOWN

TRAINED = "bold green"
MARKS = ("⟦", "⟧")  # around trained text where there is no color


@dataclass(frozen=True)
class Segment:
    """Neighboring tokens that are all trained or all only read, as text."""

    text: str
    trained: bool


def segments(example: Example, tokenizer: Any) -> list[Segment]:
    """The example's text, cut where training begins and ends; special tokens are written out."""
    found, end, before = [], 0, ""
    for trained, run in groupby(example.supervised.tolist()):
        end += len(list(run))
        upto = tokenizer.decode(  # from the start each time: some tokenizers drop a first space
            example.tokens[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        found.append(Segment(upto[len(before) :], trained))
        before = upto
    return found


def colored(parts: Sequence[Segment], color: bool) -> Text:
    """Segments in color, or with marks; control characters are spelled out, so that rows cannot steer a terminal."""
    text = Text()
    for part in parts:
        shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in part.text)
        if part.trained:
            text.append(shown if color else f"{MARKS[0]}{shown}{MARKS[1]}", style=TRAINED)
        else:
            text.append(shown)
    return text


def histogram(lengths: Sequence[int], bins: int = 10, width: int = 40) -> list[str]:
    """Lines like `  33 -   64  ██████ 120`, in at most `bins` equal steps from 1 to the longest."""
    step = -(-max(lengths) // bins)
    counts = np.bincount((np.asarray(lengths) - 1) // step)
    digits, most = len(f"{step * len(counts):,}"), int(counts.max())
    lines = []
    for number, count in enumerate(counts.tolist()):
        bar = "█" * max(round(width * count / most), int(count > 0))
        lines.append(f"{number * step + 1:>{digits},} - {(number + 1) * step:>{digits},}  {bar:<{width}} {count:,}")
    return lines


@dataclass(frozen=True)
class Totals:
    """Figures of one epoch."""

    steps_per_epoch: int
    micro_batches_per_epoch: int
    tokens_per_micro_batch: float
    """On average."""
    packing_efficiency: float
    """Tokens over those that attention computes, where each document is padded to the longest of its micro-batch."""
    supervised_share: float
    """Trained tokens over all tokens."""


def totals(rendered: Rendered, plan: Sequence[Sequence[Sequence[int]]]) -> Totals:
    """What the plan of one epoch (see `plan_batches`) makes of the examples."""
    lengths = [len(e) for e in rendered.examples]
    micro_batches = [micro for step in plan for micro in step]
    padded = sum(len(micro) * max(lengths[i] for i in micro) for micro in micro_batches)
    report = rendered.report
    return Totals(
        steps_per_epoch=len(plan),
        micro_batches_per_epoch=len(micro_batches),
        tokens_per_micro_batch=report.tokens / len(micro_batches),
        packing_efficiency=report.tokens / padded,
        supervised_share=report.supervised / report.tokens,
    )


def describe(rendered: Rendered, figures: Totals) -> list[str]:
    """The totals in sentences."""
    report = rendered.report
    read = "; ".join(f"{name}, {count:,} rows" for name, count in report.layouts.items())
    lines = [f"read as     {read}"]
    if report.unused:
        lines.append(f"not read    columns {', '.join(map(repr, report.unused))}")
    changed = [(report.truncated, "truncated"), (report.split, "split"), (report.dropped, "dropped")]
    told = ", ".join(f"{count:,} {what}" for count, what in changed if count) or "none too long"
    if report.dropped:
        told += f" at lines {', '.join(map(str, report.dropped_lines))}{', ...' * (report.dropped > SHOWN)}"
    return [
        *lines,
        f"rows        {report.rows:,}, {told}; {report.examples:,} examples",
        f"lengths     half up to {report.length_p50:,} tokens, 90% up to {report.length_p90:,}, "
        f"99% up to {report.length_p99:,}, all up to {report.length_max:,}",
        f"tokens      {report.tokens:,}, of which {report.supervised:,} are trained ({figures.supervised_share:.1%})",
        f"one epoch   {figures.steps_per_epoch:,} steps, {figures.micro_batches_per_epoch:,} micro-batches of "
        f"{figures.tokens_per_micro_batch:,.0f} tokens on average, packing efficiency {figures.packing_efficiency:.1%}",
    ]


def as_json(rendered: Rendered, figures: Totals) -> dict[str, Any]:
    """Report and totals under their names."""
    return asdict(rendered.report) | asdict(figures)
