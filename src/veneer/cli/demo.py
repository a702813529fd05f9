"""See it work: teach a small model to ask a company's database, in a few minutes on this machine.

It ends with one line of JSON on stdout, with or without --json; with it, what is meant for people goes to stderr.
"""

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from veneer.cli.console import AsJson, DeviceName, emit_json, stderr, stdout
from veneer.errors import ConfigError
from veneer.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from veneer.base.base import Base
    from veneer.data.render import Renderer
    from veneer.data.sources import Row
    from veneer.evaluate.runner import Evaluation
    from veneer.recipe.settings import Recipe

RECIPE = """\
# What `veneer demo` trains; change it and run `veneer train {folder}/recipe.yaml --run {folder}/mine`
model: smollm2-135m-instruct
method: {{name: lora, rank: 16, alpha: 32, targets: all-linear}}
data:
  train: {folder}/train.jsonl
  prompt: "{{question}}"
  completion: "{{sql}}"
  format: plain
optimizer: {{lr: 4e-3}}
train: {{epochs: 1, tokens_per_step: 1024, max_length: 256, warmup: 0.05}}
run: {folder}/run
"""
VERIFY_ROWS = 50
DATABASE, TRAIN, HELD_OUT = "company.sqlite", "train.jsonl", "held_out.jsonl"
DATA = files("veneer.cli") / "demo_data"
"""Written by the generator, demo/ of the repository."""


def command(
    folder: Annotated[Path, typer.Option(help="Where everything is written; a new or empty folder.")] = Path(
        "veneer-demo"
    ),
    train_rows: Annotated[int, typer.Option(help="Questions to learn from.", min=20)] = 3_000,
    held_out_rows: Annotated[int, typer.Option(help="Questions to be measured on.", min=10)] = 200,
    device: DeviceName = "auto",
    as_json: AsJson = False,
) -> None:
    """Train SmolLM2-135M to turn questions into SQL, measure it before and after, ask it, merge it, verify it.

    The last line is one JSON object in any case; --json leaves nothing else on stdout. Example:

        veneer demo --folder /tmp/veneer-demo
    """
    from veneer.adapters.attach import load_adapter
    from veneer.base.device import find_device
    from veneer.base.load import load_model
    from veneer.cli.train import TrainProgress
    from veneer.data.render import Renderer
    from veneer.data.sources import read_rows
    from veneer.recipe.load import load_recipe
    from veneer.train.run import train_recipe

    refuse_unusable(folder)
    where = find_device(device)
    where.add_up_in_one_order()
    people = stderr if as_json else stdout
    began = time.monotonic()
    say("1. A small company: its database, questions about it, and the SQL that answers them")
    write_data(folder, train_rows, held_out_rows)
    recipe_file = folder / "recipe.yaml"
    named = "" if device == "auto" else f"device: {device}\n"
    recipe_file.write_text(RECIPE.format(folder=folder) + named, encoding="utf-8")
    recipe = load_recipe(recipe_file)
    say("2. Before: what the model makes of held-out questions (phrasings and constants it will not be trained on)")
    base = load_model(recipe.model, device=recipe.device, dtype=recipe.train.dtype)
    rows = read_rows(str(folder / HELD_OUT))
    renderer = Renderer(base.tokenizer, recipe.data, recipe.train.max_length)
    before = measured(base, folder, rows, renderer)
    say(f"   {before.metrics['sql']:.0%} right")
    say(f"3. Training on {train_rows} other questions")
    del base
    try:
        with TrainProgress() as progress:
            outcome, _ = train_recipe(recipe, [progress])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"`veneer train {recipe_file}` goes on with the training.") from None
    say("4. After")
    base = load_model(recipe.model, device=recipe.device, dtype=recipe.train.dtype)
    adapter = load_adapter(base, outcome.adapter)
    after = measured(base, folder, rows, renderer)
    people.print(by_kind(folder, before, after))
    say("5. Three questions, asked live")
    ask(base, folder, renderer, people)
    del base, adapter
    say("6. Merging, and comparing the merged model with the unmerged one")
    prompts = [renderer.prompt(row) for row in rows[:VERIFY_ROWS]]
    merged = merged_equal(recipe, Path(outcome.adapter), folder, prompts, people)
    result = {
        "accuracy_before": before.metrics["sql"],
        "accuracy_after": after.metrics["sql"],
        "seconds": round(time.monotonic() - began, 1),
        "peak_bytes": where.peak_bytes(),
        "adapter_bytes": outcome.adapter_bytes,
        "merged_equal": merged,
    }
    finale(folder, recipe.model, result, people)
    emit_json(result)


def refuse_unusable(folder: Path) -> None:
    """Raise ConfigError for a folder that is taken, or whose name a recipe cannot hold as it is."""
    from veneer.recipe.yaml_io import read_value

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a new folder with --folder")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; name another folder with --folder, or remove this one")
    try:
        understood = read_value(f"{folder}/run")
    except ConfigError:
        understood = None
    if understood != f"{folder}/run":
        raise ConfigError(f"{str(folder)!r} would need quotes in a recipe; name a folder of letters with --folder")


def write_data(folder: Path, train_rows: int, held_out_rows: int) -> None:
    """Write the database and the first rows of each set.  Raises ConfigError for more rows than there are."""
    from veneer.disk.atomic import replacing

    wanted = {TRAIN: ("--train-rows", train_rows), HELD_OUT: ("--held-out-rows", held_out_rows)}
    rows = {name: (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True) for name in wanted}
    few = [
        f"{flag} is {n}, but there are {len(rows[name])} such questions; ask for at most {len(rows[name])}"
        for name, (flag, n) in wanted.items()
        if n > len(rows[name])
    ]
    if few:
        raise ConfigError("\n".join(few))
    for name, (_, n) in wanted.items():
        with replacing(folder / name) as temporary:
            temporary.write_text("".join(rows[name][:n]), encoding="utf-8")
    with replacing(folder / DATABASE) as temporary, closing(sqlite3.connect(temporary)) as connection:
        connection.executescript((DATA / "company.sql").read_text(encoding="utf-8"))


def say(message: str) -> None:
    """What happens now, on stderr."""
    stderr.print(message, style="bold cyan", markup=False, soft_wrap=True)


def measured(base: "Base", folder: Path, rows: "list[Row]", renderer: "Renderer") -> "Evaluation":
    """Execution accuracy on the held-out questions, with whatever is attached."""
    from functools import partial

    from veneer.data.progress import showing
    from veneer.evaluate.metrics import MetricOptions
    from veneer.evaluate.runner import EvalSettings, evaluate

    settings = EvalSettings(metrics=("sql",), max_new_tokens=80, options=MetricOptions(database=folder / DATABASE))
    return evaluate(base, rows, renderer, settings, progress=partial(showing, console=stderr))


def by_kind(folder: Path, before: "Evaluation", after: "Evaluation") -> Table:
    """Execution accuracy by kind of question."""
    from veneer.data.sources import read_rows

    kinds = [str(row.columns["kind"]) for row in read_rows(str(folder / HELD_OUT))]
    table = Table(title="Held-out questions whose SQL gives the right result")
    for name in ("question type", "rows", "before", "after"):
        table.add_column(name, justify="left" if name == "question type" else "right")
    for kind in [*dict.fromkeys(sorted(kinds)), "all"]:
        members = [i for i, k in enumerate(kinds) if kind in (k, "all")]
        shares = [sum(e.predictions[i]["scores"]["sql"] for i in members) / len(members) for e in (before, after)]
        table.add_row(kind, str(len(members)), *(f"{share:.0%}" for share in shares), end_section=kind == max(kinds))
    return table


def ask(base: "Base", folder: Path, renderer: "Renderer", people: Console) -> None:
    """Let the model write SQL for three questions, run it, and show what the database says."""
    from veneer.data.sources import read_rows
    from veneer.evaluate.runner import EvalSettings, answer
    from veneer.evaluate.sql_sandbox import QueryError, Sandbox

    with as_file(DATA / "showcase.jsonl") as path:
        questions = list(read_rows(str(path)))
    prompts = [renderer.prompt(row) for row in questions]
    settings = EvalSettings(metrics=("exact_match",), max_new_tokens=80)
    for question, sql in zip(questions, answer(base, prompts, settings), strict=True):
        people.print(f"\n{question.columns['question']}", style="bold", markup=False, soft_wrap=True)
        people.print(f"  {sql}", style="green", markup=False, soft_wrap=True)
        try:
            with Sandbox.open(folder / DATABASE) as database:
                people.print(f"  {shown(database.run(sql))}", markup=False, soft_wrap=True)
        except QueryError as error:
            people.print(f"  this query does not run: {error}", markup=False, soft_wrap=True)
    people.print()


def shown(result: Sequence[tuple[Any, ...]], most: int = 6) -> str:
    """The first rows of a result, on one line."""
    rows = "; ".join(", ".join(str(cell) for cell in row) for row in result[:most])
    return f"{rows}{f'; ... {len(result)} rows' if len(result) > most else ''}" or "(no rows)"


def merged_equal(recipe: "Recipe", adapter: Path, folder: Path, prompts: list[list[int]], people: Console) -> bool:
    """Merge, verify on held-out questions (token ids), and say whether every greedy text is the same."""
    from veneer.adapters.attach import load_adapter
    from veneer.base.load import load_model
    from veneer.merge.verified_merge import merge_and_verify

    base = load_model(recipe.model, device=recipe.device, dtype="float32")
    attached = load_adapter(base, adapter)
    drift = merge_and_verify(base, attached, folder / "merged", prompts).drift
    people.print(
        f"merged and unmerged write the same text for {drift.greedy_agreement:.0%} of {drift.rows} questions; "
        f"relative logit drift {drift.relative_drift:.2g}",
        soft_wrap=True,
    )
    return drift.greedy_agreement == 1.0


def finale(folder: Path, model: str, result: dict[str, Any], people: Console) -> None:
    """The figures that matter, and what to type next (the adapter is asked as its rows were)."""
    people.print(
        f"{result['accuracy_before']:.0%} -> {result['accuracy_after']:.0%} right, in "
        f"{format_seconds(result['seconds'])}, peak memory {format_bytes(result['peak_bytes'])}, adapter "
        f"{format_bytes(result['adapter_bytes'])}\n\nNext:\n"
        f"  veneer generate {model} --adapter {folder}/run/adapter --prompt 'How many orders are from 2021?'\n"
        f"  veneer eval {folder}/run --data {folder}/held_out.jsonl --metric sql --database {folder}/company.sqlite\n"
        f"  veneer generate {folder}/merged --format plain --prompt 'Which customers are in Berlin?'",
        soft_wrap=True,
    )
