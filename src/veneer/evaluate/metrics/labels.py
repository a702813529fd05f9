"""accuracy and f1: answers as labels.

The labels are those of the references. An answer that is none of them is wrong, and is no label of its own. White
space is compared as single spaces; case counts unless `ignore_case`.
"""

from collections.abc import Sequence
from typing import Any

from veneer.errors import DataError, did_you_mean
from veneer.evaluate.metrics.base import METRICS, Columns, MetricOptions, Scores, mean, plain


@METRICS.add("accuracy")
def accuracy(predictions: Sequence[str], references: Sequence[Any], rows: Columns, options: MetricOptions) -> Scores:
    """In [0, 1]: the share of answers that are the reference label."""
    given, wanted = _labels(predictions, references, options)
    return mean("accuracy", [float(g == w) for g, w in zip(given, wanted, strict=True)])


@METRICS.add("f1")
def f1(predictions: Sequence[str], references: Sequence[Any], rows: Columns, options: MetricOptions) -> Scores:
    """In [0, 1]: `f1`, the mean over all labels (macro), and `f1_positive`, that of `positive` if it is given.

    Raises DataError for a positive label that no reference has.
    """
    given, wanted = _labels(predictions, references, options)
    by_label = {label: _f1(given, wanted, label) for label in sorted(set(wanted))}
    values = {"f1": sum(by_label.values()) / len(by_label) if by_label else 0.0}
    if options.positive is not None:
        positive = plain(options.positive, options.ignore_case)
        if positive not in by_label:
            known = list(by_label)
            raise DataError(
                f"metric f1: no reference has the positive label {options.positive!r}"
                f"{did_you_mean(positive, known)} Labels: {', '.join(known[:20])}."
            )
        values["f1_positive"] = by_label[positive]
    return Scores(values, [float(g == w) for g, w in zip(given, wanted, strict=True)])


def _labels(
    predictions: Sequence[str], references: Sequence[Any], options: MetricOptions
) -> tuple[list[str], list[str]]:
    for reference in references:
        if isinstance(reference, list | tuple | dict) or not str(reference).strip():
            raise DataError(f"the metrics accuracy and f1 need one label a row, got {reference!r}")
    case = options.ignore_case
    return [plain(p, case) for p in predictions], [plain(str(r), case) for r in references]


def _f1(given: Sequence[str], wanted: Sequence[str], label: str) -> float:
    """2 tp / (2 tp + fp + fn)."""
    both = sum(g == w == label for g, w in zip(given, wanted, strict=True))
    either = given.count(label) + wanted.count(label)
    return 2 * both / either
