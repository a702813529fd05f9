"""accuracy and F1 against counting by hand."""

import pytest

from veneer.errors import DataError
from veneer.evaluate.metrics import METRICS, MetricOptions

WANTED = ["spam", "spam", "spam", "ham", "ham", "ham", "ham", "ham"]
GIVEN = ["spam", "spam", "ham", "ham", "ham", "spam", " ham ", "I think"]
ROWS = [{}] * 8


def test_accuracy_counts_equal_labels() -> None:
    scores = METRICS["accuracy"](GIVEN, WANTED, ROWS, MetricOptions())
    assert scores.values == {"accuracy": 5 / 8} and scores.rows == [1, 1, 0, 1, 1, 0, 1, 0]


def test_f1_by_counting() -> None:
    """spam: tp 2, fp 1, fn 1.  ham: tp 3, fp 1, fn 2 (the answer that is no label is a miss, and no third label)."""
    spam, ham = 2 * 2 / (2 * 2 + 1 + 1), 2 * 3 / (2 * 3 + 1 + 2)
    values = METRICS["f1"](GIVEN, WANTED, ROWS, MetricOptions(positive="spam")).values
    assert values == {"f1": pytest.approx((spam + ham) / 2), "f1_positive": pytest.approx(spam)}
    assert list(METRICS["f1"](GIVEN, WANTED, ROWS, MetricOptions()).values) == ["f1"]


def test_case_counts_unless_ignored() -> None:
    for name in ("accuracy", "f1"):
        assert METRICS[name](["Spam"], ["spam"], [{}], MetricOptions()).values[name] == 0
        assert METRICS[name](["Spam"], ["spam"], [{}], MetricOptions(ignore_case=True)).values[name] == 1


def test_a_positive_label_nobody_has() -> None:
    with pytest.raises(DataError, match=r"positive label 'spma'\. Did you mean 'spam'\? Labels: ham, spam\."):
        METRICS["f1"](GIVEN, WANTED, ROWS, MetricOptions(positive="spma"))


@pytest.mark.parametrize("reference", [["a", "b"], "", {}])
def test_references_that_are_no_label(reference: object) -> None:
    with pytest.raises(DataError, match="one label a row"):
        METRICS["accuracy"](["a"], [reference], [{}], MetricOptions())
