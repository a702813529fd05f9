"""Fold an adapter into its base model and verify the result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.console import AsJson, emit_json, stderr, stdout
from veneer.errors import ConfigError
from veneer.units import format_bytes

if TYPE_CHECKING:
    from veneer.models.load import Loaded

ROWS = 50


def command(
    model: Annotated[str, typer.Argument(help="The base model: an alias, a hub id, a folder or a .gguf file.")],
    adapter: Annotated[Path, typer.Option(help="The adapter's folder.")],
    into: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    data: Annotated[str | None, typer.Option(help="Rows to verify on; by default those it was trained with.")] = None,
    rows: Annotated[int, typer.Option(help="How many rows to verify on.", min=1)] = ROWS,
    dtype: Annotated[str, typer.Option(help="Of the written weights: keep, float32, bfloat16 or float16.")] = "keep",
    allow_other_base: Annotated[bool, typer.Option(help="Merge into a base it was not trained on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL with the adapter folded in as a folder that transformers loads, and check that it says the same.

    Example: veneer merge smollm2-135m-instruct --adapter runs/sql/adapter --into models/sql
    """
    from veneer.adapters.attach import load_adapter
    from veneer.evaluate.merged import merge_and_verify
    from veneer.models.load import compute_dtype, load_model

    if into.exists():
        raise ConfigError(f"{into} exists already; merge into a new folder, or remove that one")
    chosen = None if dtype == "keep" else compute_dtype(dtype)
    loaded = load_model(model, dtype="float32")  # so that what is compared is the fold, not the rounding of sums
    attached = load_adapter(loaded.model, adapter, allow_other_base=allow_other_base)
    prompts = _prompts(loaded, adapter, data, rows)
    merged = merge_and_verify(
        loaded, attached, into, prompts, dtype=chosen, say=lambda m: stderr.print(m, style="dim", markup=False)
    )
    drift = merged.drift
    stdout.print(f"merged: {merged.folder} ({format_bytes(merged.bytes)})")
    stdout.print(
        f"verified on {drift.rows} rows: same greedy text on {drift.greedy_agreement:.0%}"
        + (f" ({drift.near_ties} near ties)" if drift.near_ties else "")
        + f", largest logit difference {drift.max_drift:.3g}, relative {drift.relative_drift:.2g}"
    )
    if as_json:
        emit_json({"folder": merged.folder, "bytes": merged.bytes, **vars(drift)})


def _prompts(loaded: "Loaded", adapter: Path, data: str | None, rows: int) -> list[list[int]]:
    """Prompts of real rows, rendered as the adapter was trained; raises ConfigError if none are known."""
    from veneer.data.render import Renderer
    from veneer.data.settings import DataSettings
    from veneer.data.sources import read_rows
    from veneer.disk.adapter_dir import read_adapter

    recipe: dict[str, Any] = read_adapter(adapter).facts.get("recipe") or {}
    known = recipe.get("data") or {}
    source = data or known.get("eval") or known.get("train")
    if source is None:
        raise ConfigError(f"{adapter} does not say what it was trained on; give rows to verify on with --data FILE")
    settings = DataSettings.model_validate({**known, "train": source, "eval": None, "eval_rows": None})
    renderer = Renderer(loaded.tokenizer, settings, (recipe.get("train") or {}).get("max_length", 1024))
    return [renderer.prompt(row) for row in read_rows(source, split=settings.split, limit=rows)]
