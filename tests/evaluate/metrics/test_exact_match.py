"""exact_match counts answers equal up to white space."""

from veneer.evaluate.metrics import METRICS, MetricOptions


def test_white_space_does_not_count_and_case_does() -> None:
    score = METRICS["exact_match"]
    predictions = [" a  b\n", "A b", "c", "42", ""]
    references = ["a b", "a b", ["x", "c"], 42, "x"]
    rows = [{}] * 5
    assert score(predictions, references, rows, MetricOptions()).rows == [1, 0, 1, 1, 0]
    assert score(predictions, references, rows, MetricOptions(ignore_case=True)).values == {"exact_match": 0.8}
