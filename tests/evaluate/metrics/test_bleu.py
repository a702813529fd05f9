"""BLEU against the definition, counted by hand on a small corpus."""

import math
import sys
from collections import Counter

import pytest

from veneer.errors import ConfigError
from veneer.evaluate.metrics import METRICS, MetricOptions

PREDICTIONS = ["the cat sat on the mat today", "there is a cat on the mat", "no cats live here at all"]
REFERENCES = [
    ["the cat sat on a mat today", "today the cat sat on the mat"],
    ["there is a cat on the red mat"],
    ["no cats live here any more", "here live no cats at all", "cats do not live here"],
]


def by_definition(predictions: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002: clipped n-gram precision for n = 1..4, geometric mean, brevity penalty."""
    log_precision = 0.0
    for n in range(1, 5):
        hit = total = 0
        for prediction, many in zip(predictions, references, strict=True):
            mine = grams(prediction, n)
            best = Counter[tuple[str, ...]]()
            for reference in many:
                best |= grams(reference, n)
            hit += sum((mine & best).values())
            total += sum(mine.values())
        log_precision += math.log(hit / total) / 4
    length = sum(len(p.split()) for p in predictions)
    closest = sum(
        min((abs(len(r.split()) - len(p.split())), len(r.split())) for r in many)[1]
        for p, many in zip(predictions, references, strict=True)
    )
    return 100 * math.exp(min(0.0, 1 - closest / length)) * math.exp(log_precision)


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    tokens = text.split()
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def test_is_the_definition_with_unequal_numbers_of_references() -> None:
    scores = METRICS["bleu"](PREDICTIONS, REFERENCES, [{}] * 3, MetricOptions())
    assert scores.values["bleu"] == pytest.approx(by_definition(PREDICTIONS, REFERENCES), abs=1e-9)
    assert scores.rows == [None, None, None]


def test_equal_texts_have_100() -> None:
    assert METRICS["bleu"](PREDICTIONS, PREDICTIONS, [{}] * 3, MetricOptions()).values["bleu"] == pytest.approx(100)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"bleu needs sacrebleu.*pip install 'veneer\[metrics\]'"):
        METRICS["bleu"](["a"], ["a"], [{}], MetricOptions())
