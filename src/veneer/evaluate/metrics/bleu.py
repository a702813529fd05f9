"""bleu: corpus BLEU by the sacrebleu library, with its standard settings (13a tokens, exponential smoothing).

Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from veneer.evaluate.metrics.base import METRICS, Columns, MetricOptions, Scores, alternatives, missing_library


@METRICS.add("bleu")
def bleu(predictions: Sequence[str], references: Sequence[Any], rows: Columns, options: MetricOptions) -> Scores:
    """In [0, 100], as it is published; over the corpus, so single rows have none. Rows may have several references."""
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise missing_library("bleu", "sacrebleu") from error
    if not predictions:
        return Scores({"bleu": 0.0}, [])
    streams = [list(s) for s in zip_longest(*(alternatives(r) for r in references))]
    score = BLEU().corpus_score(list(predictions), streams).score
    return Scores({"bleu": float(score)}, [None] * len(predictions))
