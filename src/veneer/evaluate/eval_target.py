"""What is evaluated: a run's model, data and adapter, or a model and an adapter folder; before beside after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapters.attach import load_adapter
from veneer.base.load import Say, load_model
from veneer.base.storage_config import storage_for
from veneer.data.prompt_format import MAX_LENGTH, recorded_settings
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.data.sources import Row, read_rows
from veneer.errors import ConfigError
from veneer.evaluate.runner import EvalSettings, Evaluation, ShowProgress, evaluate, silent
from veneer.recipe.load import load_recipe


@dataclass(frozen=True)
class Subject:
    """A model, the way its rows are read, and perhaps an adapter."""

    model: str
    adapter: Path | None
    data: DataSettings
    source: str
    """The rows to evaluate on."""
    max_length: int
    dtype: str
    device: str = "auto"
    storage: str | None = None
    """How the model's weights are kept; None as they were when the adapter was trained."""
    allow_other_base: bool = False


def subject_of(
    target: str,
    *,
    adapter: Path | None,
    source: str | None,
    templates: dict[str, Any],
    dtype: str = "auto",
    device: str = "auto",
    storage: str | None = None,
    allow_other_base: bool = False,
) -> Subject:
    """What `target`, a run's folder or a model, asks for.

    source      rows; for a run by default the recipe's data.eval
    templates   settings of DataSettings that outrank the recipe's (None: not given)
    dtype, device   by default the recipe's
    storage     how the model's weights are kept; by default as the adapter was trained
    Raises ConfigError for a run without adapter, or no rows named.
    """
    recorded: dict[str, Any] = {}
    model, length = target, MAX_LENGTH
    if (Path(target) / "recipe.yaml").is_file():
        run = Path(target)
        recipe = load_recipe(run / "recipe.yaml")
        adapter = adapter or run / "adapter"
        if not adapter.is_dir():
            raise ConfigError(f"the run {run} has no adapter yet ({adapter} is missing); finish it with veneer train")
        source = source or recipe.data.eval
        if source is None:
            raise ConfigError(f"the recipe of {run} names no data.eval; name the rows to evaluate on (data=FILE)")
        recorded = {"recipe": {"data": recipe.data.model_dump(exclude_unset=True)}}
        model, length = recipe.model, recipe.train.max_length
        dtype = dtype if dtype != "auto" else recipe.train.dtype
        device = device if device != "auto" else recipe.device
    if source is None:
        raise ConfigError(f"name the rows to evaluate on (data=FILE); {target} is not a run with a recipe of its own")
    data, _ = recorded_settings(recorded, source, **templates)
    return Subject(model, adapter, data, source, length, dtype, device, storage, allow_other_base)


def rows_of(subject: Subject, most: int | None = None) -> list[Row]:
    """The rows, or the first `most` of them."""
    return read_rows(subject.source, split=subject.data.split, limit=most)


def default_metrics(data: DataSettings, rows: Sequence[Row], reference: str | None) -> tuple[str, ...]:
    """exact_match against a column of its own; else the loss, and exact_match where there is something to answer."""
    if reference is not None:
        return ("exact_match",)
    if data.text is not None or (data.prompt is None and set(rows[0].columns) == {"text"}):
        return ("loss", "perplexity")
    return ("loss", "perplexity", "exact_match")


def measure(
    subject: Subject,
    rows: Sequence[Row],
    settings: EvalSettings,
    *,
    before: bool = True,
    progress: ShowProgress = silent,
    say: Say = lambda _: None,
) -> tuple[Evaluation | None, Evaluation]:
    """The evaluation without the adapter (None if there is none, or not `before`), and as it is.

    Raises what loading the model, loading the adapter and evaluating raise.
    """
    storage = storage_for([] if subject.adapter is None else [subject.adapter], subject.storage)
    base = load_model(subject.model, storage=storage, device=subject.device, dtype=subject.dtype, say=say)
    adapter = None
    if subject.adapter is not None:
        adapter = load_adapter(base, subject.adapter, allow_other_base=subject.allow_other_base)
    renderer = Renderer(base.tokenizer, subject.data, subject.max_length)

    def one() -> Evaluation:
        return evaluate(base, rows, renderer, settings, progress=progress)

    first = None
    if adapter is not None and before:
        with adapter.disabled():
            first = one()
    return first, one()


def table(before: Evaluation | None, after: Evaluation) -> list[tuple[str, ...]]:
    """Lines of (metric, value), or (metric, before, after, change), with a heading."""
    if before is None:
        return [("metric", "value"), *((name, f"{value:.4g}") for name, value in after.metrics.items())]
    lines: list[tuple[str, ...]] = [("metric", "before", "after", "change")]
    for name, value in after.metrics.items():
        old = before.metrics[name]
        lines.append((name, f"{old:.4g}", f"{value:.4g}", f"{value - old:+.4g}"))
    return lines


def prediction_rows(before: Evaluation | None, after: Evaluation) -> list[dict[str, Any]]:
    """The rows of a predictions file; with `prediction_before` and `scores_before` where both were measured."""
    if before is None:
        return after.predictions
    return [
        new | {"prediction_before": old["prediction"], "scores_before": old["scores"]}
        for old, new in zip(before.predictions, after.predictions, strict=True)
    ]
