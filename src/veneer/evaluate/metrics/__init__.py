"""Metrics of answers: each is one file that registers itself in METRICS."""

from veneer.evaluate.metrics.base import METRICS, MetricOptions, Scores
from veneer.registry import import_siblings

__all__ = ["METRICS", "MetricOptions", "Scores"]

import_siblings(__name__, list(__path__))
