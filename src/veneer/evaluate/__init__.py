"""Measure a model on rows: losses and metrics of answers; `veneer.evaluate(base, rows)` calls this package."""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.base.base import Base
    from veneer.evaluate.runner import Evaluation


class _Verb(ModuleType):
    """This package, which can be called."""

    def __call__(self, base: "Base", data: str | Path | Any, **settings: Any) -> "Evaluation":
        """Measure `base` on rows; see veneer.evaluate.eval_target.evaluate_rows."""
        from veneer.evaluate.eval_target import evaluate_rows

        return evaluate_rows(base, data, **settings)


sys.modules[__name__].__class__ = _Verb
