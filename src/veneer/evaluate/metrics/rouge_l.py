"""rouge_l: the longest common subsequence of words, as an F-measure, by the rouge-score library.

Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3. Words are runs of letters and
digits of any script, lower-cased, unstemmed; the library's own tokenizer drops all but a-z and 0-9, and on such text
both agree. A script without spaces between words counts a run as one word.
"""

import re
from collections.abc import Sequence
from typing import Any

from veneer.evaluate.metrics.base import METRICS, Columns, MetricOptions, Scores, alternatives, mean, missing_library


class Words:
    """The tokenizer handed to the library."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-cased runs of letters and digits."""
        return re.findall(r"[^\W_]+", text.lower())


@METRICS.add("rouge_l")
def rouge_l(predictions: Sequence[str], references: Sequence[Any], rows: Columns, options: MetricOptions) -> Scores:
    """In [0, 1]: the mean over rows of the best F-measure among a row's references."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_library("rouge_l", "rouge-score") from error
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    best = [
        max(float(scorer.score(a, p)["rougeL"].fmeasure) for a in alternatives(r))
        for p, r in zip(predictions, references, strict=True)
    ]
    return mean("rouge_l", best)
