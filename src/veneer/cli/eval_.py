"""Measure a model on rows, before and after its adapter."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.console import AllowOtherBase, AsJson, DeviceName, Dtype, KeptIn, emit_json, remark, say, stderr


def command(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model with --adapter.")],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter folder; a run has its own.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows; for a run by default data.eval.")] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help="May be repeated, or a,b,c.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEMPLATE", help="As data.prompt of a recipe.")] = None,
    completion: Annotated[str | None, typer.Option(metavar="TEMPLATE", help="As data.completion.")] = None,
    text: Annotated[str | None, typer.Option(metavar="TEMPLATE", help="As data.text.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEMPLATE", help="As data.system.")] = None,
    format: Annotated[str | None, typer.Option(metavar="chat|plain", help="As data.format.")] = None,  # noqa: A002
    reference: Annotated[str | None, typer.Option(metavar="COLUMN", help="Right answers, one or a list.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Answers generated together.")] = 64,
    database: Annotated[Path | None, typer.Option(metavar="FILE", help="sql: the SQLite file to ask.")] = None,
    seconds: Annotated[float, typer.Option(help="sql: most seconds for one query.")] = 5.0,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Compare letters regardless of case.")] = False,
    positive: Annotated[str | None, typer.Option(metavar="LABEL", help="f1: the label to report alone too.")] = None,
    before: Annotated[bool, typer.Option(help="Measure without the adapter too.")] = True,
    predictions: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Write every answer here.")] = None,
    dtype: Dtype = "auto",
    device: DeviceName = "auto",
    storage: KeptIn = None,
    allow_other_base: AllowOtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on rows; with an adapter, before and after side by side.

    Metrics: loss, perplexity, exact_match, numeric, accuracy, f1, rouge_l, bleu, sql. Example:

        veneer eval runs/sql --data test.jsonl --metric sql --database company.db --predictions answers.jsonl
    """
    from functools import partial

    from veneer.data.progress import showing
    from veneer.errors import ConfigError
    from veneer.evaluate.eval_target import default_metrics, measure, prediction_rows, rows_of, subject_of
    from veneer.evaluate.metrics import MetricOptions
    from veneer.evaluate.runner import EvalSettings

    templates = {"prompt": prompt, "completion": completion, "text": text, "system": system, "format": format}
    subject = subject_of(
        target,
        adapter=adapter,
        source=data,
        templates=templates,
        dtype=dtype,
        device=device,
        storage=storage,
        allow_other_base=allow_other_base,
    )
    options = MetricOptions(ignore_case=ignore_case, positive=positive, database=database, seconds=seconds)
    names = tuple(n.strip() for given in metric or () for n in given.split(",") if n.strip())
    found = rows_of(subject, rows)
    settings = EvalSettings(
        metrics=names or default_metrics(subject.data, found, reference),
        max_new_tokens=max_tokens,
        batch_size=batch_size,
        reference=reference,
        options=options,
    )
    if predictions is not None and not settings.of_answers:
        raise ConfigError(
            f"there would be no answers to write: {', '.join(settings.metrics)} need none; name a --metric"
        )
    showing_here = partial(showing, console=stderr)
    old, new = measure(subject, found, settings, before=before, progress=showing_here, say=remark)
    if predictions is not None:
        _write(predictions, prediction_rows(old, new))
    for count, what in ((new.truncated, "prompts were too long and lost their beginning"),
                        (new.dropped, "rows were too long and are not in the loss")):  # fmt: skip
        if count:
            stderr.print(f"{count} {what}")
    if as_json:
        result: dict[str, Any] = {"metrics": new.metrics, "rows": new.rows, "seconds": new.seconds}
        emit_json(result | ({"before": old.metrics} if old is not None else {}))
    else:
        _print(old, new, subject.source, predictions)


def _print(old: Any, new: Any, source: str, predictions: Path | None) -> None:
    from veneer.evaluate.eval_target import table

    lines = table(old, new)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        say("  ".join(cells))
    say(f"{new.rows} rows of {source}")
    if predictions is not None:
        say(f"answers: {predictions}")


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    from veneer.disk.atomic import replacing

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
