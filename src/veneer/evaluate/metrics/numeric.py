"""numeric: the share of answers whose number is the reference's, within 1e-4.

The number of a text is, in this order: what follows "####" (the mark of GSM8K); the value of the whole text, of its
last line, or of what follows the last "=" or ":", if that is arithmetic; else the last number in it.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from veneer.errors import DataError
from veneer.evaluate.metrics.base import METRICS, Columns, MetricOptions, Scores, mean

TOLERANCE = 1e-4
LONGEST = 1000
"""Characters of an expression; what is longer is no expression here."""
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+")
OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


@METRICS.add("numeric")
def numeric(predictions: Sequence[str], references: Sequence[Any], rows: Columns, options: MetricOptions) -> Scores:
    """In [0, 1].  Raises DataError for a reference without a number."""
    hits = []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        many = reference if isinstance(reference, list | tuple) else [reference]
        wanted = [number(str(r)) for r in many]
        if not wanted or None in wanted:
            raise DataError(f"metric numeric: the reference {reference!r} (answer {index + 1}) has no number in it")
        got = number(prediction)
        hits.append(float(got is not None and any(abs(got - w) <= TOLERANCE for w in wanted if w is not None)))
    return mean("numeric", hits)


def number(text: str) -> float | None:
    """The number that a text comes to, or None; always finite."""
    text = text.strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    line = text.splitlines()[-1] if text else ""
    for part in dict.fromkeys((text, line, re.split("[=:]", line)[-1])):
        value = arithmetic(part.replace("$", "").replace("\N{MULTIPLICATION SIGN}", "*"))
        if value is not None:
            return value
    found = NUMBER.findall(text)
    value = float(found[-1].replace(",", "")) if found else math.nan
    return value if math.isfinite(value) else None


def arithmetic(text: str) -> float | None:
    """The value of numbers, + - * / and parentheses; None for anything else.  Nothing is ever executed."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip().rstrip("."))
    if not text or len(text) > LONGEST:
        return None
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError("not arithmetic")
