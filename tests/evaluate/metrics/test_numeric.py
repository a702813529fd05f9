"""numeric reads the number a text comes to, and never executes anything."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import DataError
from veneer.evaluate.metrics import METRICS, MetricOptions
from veneer.evaluate.metrics.numeric import arithmetic, number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("67", 67),
        ("(48 + 38) - 19", 67),
        ("( 9 * ( 11 - 6 ) )", 45),
        ("48 + 38 - 19 = 67", 67),
        ("x = 3 + 4", 7),
        ("She has 5 apples and 3 pears, so 8 in all.", 8),
        ("Step one: 4\nAnswer: 2 * 3", 6),
        ("He saves $1,234.50 a year", 1234.5),
        ("The answer is -3.5 degrees", -3.5),
        ("reasoning 5 * 5 = 25\n#### 1,000", 1000),
        ("7 / 2", 3.5),
        ("-(2 - 5)", 3),
        (".5", 0.5),
        ("3 × 4", 12),
        ("1,5 and 2", 2),
        ("no number", None),
        ("", None),
        ("1 / 0", 0),  # not arithmetic: the last number counts
        ("2 ** 100", 100),
        ("__import__('os').getpid()", None),
        ("9" * 400, None),
    ],
)
def test_number(text: str, value: float | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    ["2 ** 9", "len('a')", "a + 1", "1 if 1 else 2", "[1][0]", "True + 1", "1j", "'a' * 3", "1 // 2", "5 % 2", "~1",
     "(" * 500 + "1" + ")" * 500, "1 +", "lambda: 1", "1; 2", "9" * 2000, "1e999"],
)  # fmt: skip
def test_what_is_no_arithmetic(text: str) -> None:
    assert arithmetic(text) is None


expressions = st.recursive(
    st.integers(0, 99).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: _combine(*t)),
    max_leaves=12,
)


def _combine(a: tuple[str, Fraction], op: str, b: tuple[str, Fraction]) -> tuple[str, Fraction]:
    """The oracle: exact fractions; a division by zero becomes a sum."""
    if op == "/" and b[1] == 0:
        op = "+"
    value = {"+": a[1] + b[1], "-": a[1] - b[1], "*": a[1] * b[1], "/": a[1] / (b[1] or 1)}[op]
    return f"({a[0]} {op} {b[0]})", value


@given(expressions)
def test_arithmetic_is_exact_arithmetic(expression: tuple[str, Fraction]) -> None:
    text, value = expression
    got = arithmetic(text)
    assert got is not None and math.isclose(got, float(value), rel_tol=1e-6, abs_tol=1e-6)


def test_equal_within_a_ten_thousandth() -> None:
    score = METRICS["numeric"]
    predictions = ["3.00005", "3.0002", "nothing", "6 / 2", "1000050"]
    references = [3, 3, 3, ["4", "1 + 2"], 1000000]
    assert score(predictions, references, [{}] * 5, MetricOptions()).rows == [1, 0, 0, 1, 0]


def test_a_reference_without_a_number() -> None:
    with pytest.raises(DataError, match=r"reference 'many' \(answer 2\) has no number"):
        METRICS["numeric"](["1", "2"], ["1", "many"], [{}, {}], MetricOptions())
