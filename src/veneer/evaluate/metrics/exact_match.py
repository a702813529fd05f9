"""exact_match: the share of answers equal to a reference.

White space is compared as single spaces and not at the ends; case counts unless `ignore_case`.
"""

from collections.abc import Sequence
from typing import Any

from veneer.evaluate.metrics.base import METRICS, Columns, MetricOptions, Scores, alternatives, mean, plain


@METRICS.add("exact_match")
def exact_match(predictions: Sequence[str], references: Sequence[Any], rows: Columns, options: MetricOptions) -> Scores:
    """In [0, 1]; with several references, equal to any of them."""
    case = options.ignore_case
    hits = [
        float(plain(p, case) in {plain(a, case) for a in alternatives(r)})
        for p, r in zip(predictions, references, strict=True)
    ]
    return mean("exact_match", hits)
