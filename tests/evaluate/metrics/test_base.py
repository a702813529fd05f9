"""What all metrics share."""

import pytest

from veneer.errors import ConfigError, DataError
from veneer.evaluate.metrics import METRICS
from veneer.evaluate.metrics.base import alternatives, mean, plain


def test_the_registry_holds_every_metric() -> None:
    assert list(METRICS) == ["accuracy", "bleu", "exact_match", "f1", "numeric", "rouge_l", "sql"]
    with pytest.raises(ConfigError, match=r"no metric 'rouge'\. Did you mean 'rouge_l'\?"):
        METRICS["rouge"]


def test_mean_keeps_the_rows() -> None:
    scores = mean("m", [1.0, 0.0, 1.0, 1.0])
    assert scores.values == {"m": 0.75} and scores.rows == [1.0, 0.0, 1.0, 1.0]
    assert mean("m", []).values == {"m": 0.0}


def test_alternatives() -> None:
    assert alternatives("a") == ["a"] and alternatives(4) == ["4"] and alternatives(["a", 4]) == ["a", "4"]
    with pytest.raises(DataError, match="empty list"):
        alternatives([])


def test_plain() -> None:
    assert plain("  A\n b\t c ") == "A b c" and plain("Straße", ignore_case=True) == plain("STRASSE", ignore_case=True)
