"""ROUGE-L against ten lines of longest common subsequence."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.evaluate.metrics import METRICS, MetricOptions


def by_definition(prediction: list[str], reference: list[str]) -> float:
    """Lin 2004, equations 2 to 4 with beta = 1: 2 P R / (P + R) of the longest common subsequence."""
    table = [[0] * (len(reference) + 1) for _ in range(len(prediction) + 1)]
    for i, x in enumerate(prediction):
        for j, y in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "고양이"]), min_size=0, max_size=9)


@settings(deadline=None)  # the first call imports the library
@given(words, st.lists(words, min_size=1, max_size=3))
def test_is_the_definition_with_the_best_reference(prediction: list[str], references: list[list[str]]) -> None:
    scores = METRICS["rouge_l"]([" ".join(prediction)], [[" ".join(r) for r in references]], [{}], MetricOptions())
    assert scores.rows[0] == pytest.approx(max(by_definition(prediction, r) for r in references))
    assert scores.values["rouge_l"] == scores.rows[0]


def test_case_and_punctuation_do_not_count() -> None:
    assert METRICS["rouge_l"](["The CAT, sat!"], ["the cat sat"], [{}], MetricOptions()).values == {"rouge_l": 1.0}


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"rouge_l needs rouge-score.*pip install 'veneer\[metrics\]'"):
        METRICS["rouge_l"](["a"], ["a"], [{}], MetricOptions())
