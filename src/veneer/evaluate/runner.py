"""Evaluate a model on rows: let it answer, score the answers, and measure how likely it finds the right ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from veneer.base.base import Base
from veneer.data.example import Example
from veneer.data.render import Renderer
from veneer.data.sources import Row
from veneer.errors import ConfigError, DataError, ModelError, did_you_mean
from veneer.evaluate.metrics import METRICS, MetricOptions
from veneer.generate.engine import generate
from veneer.generate.sampler import Sampler, greedy
from veneer.tasks.base import HeldOutLoss
from veneer.tasks.causal_lm import CausalLM

OF_THE_MODEL = ("loss", "perplexity")
"""Metrics of the model itself; all others are of its answers."""

ShowProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Begins to show a piece of work of so many parts; what it yields is told how many more are done."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is measured and how.  Raises ConfigError for unknown metrics and counts below 1, all at once."""

    metrics: tuple[str, ...] = CausalLM.metrics
    """Names of metrics: loss, perplexity, or of METRICS."""
    max_new_tokens: int = 128
    """Most tokens of an answer, at least 1."""
    batch_size: int = 64
    """Answers generated together, at least 1."""
    reference: str | None = None
    """The column with the right answer (a text, a number, or a list of equally right ones); none: the completion."""
    options: MetricOptions = field(default_factory=MetricOptions)

    def __post_init__(self) -> None:
        known = sorted([*OF_THE_MODEL, *METRICS])
        problems = [
            f"there is no metric {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}."
            for name in self.metrics
            if name not in known
        ]
        if not self.metrics:
            problems.append(f"no metric was named. Known: {', '.join(known)}.")
        problems += [
            f"{name} must be at least 1, got {value}"
            for name, value in (("max_new_tokens", self.max_new_tokens), ("batch_size", self.batch_size))
            if value < 1
        ]
        if not self.options.seconds > 0:
            problems.append(f"seconds must be above 0, got {self.options.seconds}")
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def of_answers(self) -> tuple[str, ...]:
        """The metrics that need generated answers."""
        return tuple(name for name in self.metrics if name not in OF_THE_MODEL)


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    metrics: dict[str, float]
    rows: int
    predictions: list[dict[str, Any]]
    """For each row that was answered: source, line, prompt, prediction, reference, scores."""
    truncated: int
    """Prompts too long for the model, which lost their beginning."""
    dropped: int
    """Rows without a loss, because they were too long and the settings drop such rows."""
    seconds: float


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show no progress."""
    yield lambda more: None


def evaluate(
    base: Base,
    rows: Sequence[Row],
    renderer: Renderer,
    settings: EvalSettings,
    *,
    sampler: Sampler = greedy,
    progress: ShowProgress = silent,
) -> Evaluation:
    """Measure `base`, with whatever adapters are attached, on `rows` as `renderer` reads them.

    Raises DataError for no rows, rows that cannot be rendered, a reference column that is not there, or references
    that a metric cannot use, ConfigError for a library that is not installed; all before anything is generated.
    """
    if not rows:
        raise DataError("there are no rows to evaluate on")
    start = monotonic()
    references = references_of(rows, renderer, settings.reference) if settings.of_answers else []
    prompts = [renderer.prompt(row) for row in rows] if settings.of_answers else []
    score([""] * len(references), references, rows, settings)  # raises now, not after long work
    metrics: dict[str, float] = {}
    dropped = truncated = 0
    if set(settings.metrics) & set(OF_THE_MODEL):
        rendered = renderer.render_all(rows)
        dropped = rendered.report.dropped
        with progress("measuring the loss", len(rendered.examples)) as advance:
            measured = measure_loss(base, rendered.examples, renderer.max_length, advance)
        values = {"loss": measured.mean, "perplexity": measured.perplexity}
        metrics |= {name: values[name] for name in settings.metrics if name in values}
    predictions: list[dict[str, Any]] = []
    if settings.of_answers:
        fitting = [_fit(base, p, settings.max_new_tokens) for p in prompts]
        truncated = sum(len(f) < len(p) for f, p in zip(fitting, prompts, strict=True))
        answers = answer(base, fitting, settings, sampler=sampler, progress=progress)
        scores, by_row = score(answers, references, rows, settings)
        metrics |= scores
        for row, prompt, text, reference, own in zip(rows, fitting, answers, references, by_row, strict=True):
            asked = base.tokenizer.decode(prompt, skip_special_tokens=False)
            place = {"source": row.source, "line": row.line}
            predictions.append({**place, "prompt": asked, "prediction": text, "reference": reference, "scores": own})
    return Evaluation(metrics, len(rows), predictions, truncated, dropped, monotonic() - start)


def measure_loss(
    base: Base, examples: Sequence[Example], max_length: int, done: Callable[[int], object]
) -> HeldOutLoss:
    """The loss over examples: packed, or one by one where the network cannot keep packed documents apart.

    Raises ModelError for a network whose logits are not computed from its last hidden states by its output head.
    """
    task, packed = CausalLM(), True
    try:
        task.selftest(base, examples, packed=True)
    except ModelError:
        task.selftest(base, examples, packed=False)
        packed = False
    return task.held_out_loss(base, examples, packed=packed, max_length=max_length, done=done)


def references_of(rows: Sequence[Row], renderer: Renderer, column: str | None = None) -> list[Any]:
    """The right answer of each row: `column`, or the completion as the renderer writes it.

    Raises DataError naming the first rows that lack it.
    """
    if column is None:
        return [renderer.completion(row) for row in rows]
    without = [row for row in rows if row.columns.get(column) is None]
    if without:
        seen = list(dict.fromkeys(name for row in without for name in row.columns))
        raise DataError(
            f"{len(without)} of {len(rows)} rows have no reference column {column!r}{did_you_mean(column, seen)} "
            f"Columns seen: {', '.join(seen)}. First: {', '.join(row.place for row in without[:5])}."
        )
    return [row.columns[column] for row in rows]


def answer(
    base: Base,
    prompts: Sequence[Sequence[int]],
    settings: EvalSettings,
    *,
    sampler: Sampler = greedy,
    progress: ShowProgress = silent,
) -> list[str]:
    """The model's text after each prompt, without special tokens and white space around it."""
    with progress("generating answers", len(prompts)) as advance:
        tokens = generate(
            base,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            sampler=sampler,
            batch_size=settings.batch_size,
            on_finish=lambda row, tokens: advance(1),
        )
    return [str(base.tokenizer.decode(t, skip_special_tokens=True)).strip() for t in tokens]


def score(
    answers: Sequence[str], references: Sequence[Any], rows: Sequence[Row], settings: EvalSettings
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Every metric of answers: values over all rows, and each row's own by metric."""
    values: dict[str, float] = {}
    by_row: list[dict[str, float]] = [{} for _ in answers]
    columns = [row.columns for row in rows]
    for name in settings.of_answers:
        scores = METRICS[name](answers, references, columns, settings.options)
        values |= scores.values
        for own, value in zip(by_row, scores.rows, strict=True):
            if value is not None:
                own[name] = value
    return values, by_row


def _fit(base: Base, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The end of a prompt that leaves room for the answer in the model's positions, behind its first token."""
    limit = base.max_positions
    if limit is None or len(prompt) + max_new_tokens <= limit:
        return prompt
    most = max(limit - max_new_tokens, 2)
    return [prompt[0], *prompt[1 - most :]]
