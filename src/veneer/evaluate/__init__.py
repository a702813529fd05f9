"""Measure a model on rows: losses and metrics of answers; `veneer.evaluate(base, rows)` calls this package."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.base.base import Base
    from veneer.data.sources import Row
    from veneer.evaluate.metrics import MetricOptions
    from veneer.evaluate.runner import Evaluation


class Verb(ModuleType):
    """This package, which can be called."""

    def __call__(
        self,
        base: "Base",
        data: "str | Path | Sequence[Row]",
        *,
        metrics: Sequence[str] | None = None,
        limit: int | None = None,
        reference: str | None = None,
        max_new_tokens: int = 128,
        batch_size: int = 64,
        options: "MetricOptions | None" = None,
        **templates: Any,
    ) -> "Evaluation":
        """Measure `base`, with whatever adapters are attached, on rows of a file or in memory.

        metrics     by default the loss, the perplexity and exact_match
        limit       only the first rows
        reference   the column with the right answers, if that is not the completion
        options     of metrics: MetricOptions(database=..., ignore_case=True)
        templates   settings of a recipe's `data` section (prompt, completion, format ...); by default those that the
                    attached adapter's rows were read with
        Raises DataError and ConfigError for rows, columns and metrics that do not fit.
        """
        from veneer.data.prompt_format import recorded_settings
        from veneer.data.render import Renderer
        from veneer.data.sources import read_rows
        from veneer.evaluate.eval_target import default_metrics
        from veneer.evaluate.metrics import MetricOptions
        from veneer.evaluate.runner import EvalSettings, evaluate

        facts = base.attached[-1].facts if base.attached else {}
        source = str(data) if isinstance(data, str | Path) else "rows"
        settings, most = recorded_settings(facts, source, **templates)
        if isinstance(data, str | Path):
            rows = read_rows(source, split=settings.split, limit=limit)
        else:
            rows = list(data)[:limit]
        chosen = EvalSettings(
            metrics=tuple(metrics or default_metrics(settings, rows, reference)),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            reference=reference,
            options=options or MetricOptions(),
        )
        return evaluate(base, rows, Renderer(base.tokenizer, settings, most), chosen)


sys.modules[__name__].__class__ = Verb
