"""Fold an adapter into its base model and verify the result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.console import AsJson, Model, emit_json, remark, stdout
from veneer.errors import ConfigError, DataError, did_you_mean
from veneer.units import format_bytes

if TYPE_CHECKING:
    from veneer.base.base import Base

ROWS = 50
DTYPES = ("keep", "float32", "bfloat16", "float16")


def command(
    model: Model,
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="The adapter's folder.")],
    into: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist yet.")],
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to verify on; by default those it was trained with.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEMPLATE", help="As data.prompt of a recipe.")] = None,
    format: Annotated[str | None, typer.Option(metavar="chat|plain", help="As data.format.")] = None,  # noqa: A002
    rows: Annotated[int, typer.Option(help="How many rows to verify on.", min=1)] = ROWS,
    dtype: Annotated[
        str, typer.Option(help="Of the written weights: keep (the base's own), float32, bfloat16 or float16.")
    ] = "keep",
    storage: Annotated[
        str | None, typer.Option(metavar="NAME", help="Keep the model in nf4, ...; by default as the adapter's was.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge into a base it was not trained on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL with the adapter folded in as a folder that transformers loads, and check that it says the same.

    An adapter that was trained on quantized weights is folded into those, dequantized. Exit status 3 if the written
    model says something else. Example:

        veneer merge smollm2-135m-instruct --adapter runs/sql/adapter --into models/sql
    """
    from veneer.adapters.attach import load_adapter
    from veneer.base.device import DTYPES as TORCH_DTYPES
    from veneer.base.load import load_model
    from veneer.base.storage_config import storage_for
    from veneer.merge.fold import refuse_taken
    from veneer.merge.verified_merge import merge_and_verify

    if dtype not in DTYPES:
        raise ConfigError(
            f"--dtype {dtype}: there is no such dtype{did_you_mean(dtype, DTYPES)} Known: {', '.join(DTYPES)}."
        )
    refuse_taken(into, Path(model))
    kept = storage_for([adapter], storage)
    # in float32, so that what is compared is the fold, not the rounding of sums
    loaded = load_model(model, storage=kept, dtype="float32", say=remark)
    attached = load_adapter(loaded, adapter, allow_other_base=allow_other_base)
    templates = {"prompt": prompt, "completion": "", "text": None} if prompt is not None else {}
    prompts = _prompts(loaded, adapter, data, templates | ({"format": format} if format is not None else {}), rows)
    merged = merge_and_verify(
        loaded, attached, into, prompts, dtype=None if dtype == "keep" else TORCH_DTYPES[dtype], say=remark
    )
    drift = merged.drift
    if as_json:
        emit_json({"folder": merged.folder, "bytes": merged.bytes, **vars(drift)})
        return
    lines = [
        f"merged: {merged.folder} ({format_bytes(merged.bytes)})",
        f"verified on {drift.rows} rows: same greedy text on {drift.greedy_agreement:.0%}"
        + (f" ({drift.near_ties} near ties)" if drift.near_ties else "")
        + f", largest logit difference {drift.max_drift:.3g}, relative {drift.relative_drift:.2g}",
    ]
    stdout.print("\n".join(lines), markup=False, soft_wrap=True)


def _prompts(loaded: "Base", adapter: Path, data: str | None, given: dict[str, Any], rows: int) -> list[list[int]]:
    """Beginnings of real rows, read as the adapter was trained; raises ConfigError or DataError if none are known."""
    from veneer.data.render import Renderer
    from veneer.data.sources import read_rows
    from veneer.disk.adapter_dir import read_facts
    from veneer.merge.verified_merge import beginnings
    from veneer.recipe.load import recipe_from

    known = _mapping(read_facts(adapter), "recipe")
    of_data = _mapping(known, "data")
    source = data or of_data.get("eval") or of_data.get("train")
    if source is None:
        raise ConfigError(f"{adapter} does not say what it was trained on; give rows to verify on with --data FILE")
    tree = {"model": loaded.name, "run": "", "train": known.get("train", {})}
    tree["data"] = {**of_data, "train": source, "eval": None, "rows": rows, "eval_rows": None, **given}
    recipe = recipe_from(tree, where=f"the recipe in {adapter / 'veneer.json'}, or --prompt and --format")
    try:
        found = read_rows(source, split=recipe.data.split, limit=rows)
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{adapter} was trained on {source}: {error}. Give rows with --data FILE") from error
    return beginnings(found, Renderer(loaded.tokenizer, recipe.data, recipe.train.max_length))


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands under a key of somebody's JSON, if it is a mapping."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}
