"""Fold an adapter into its base model and verify the result."""

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.console import AsJson, DeviceName, KeptIn, Model, emit_json, remark, say
from veneer.errors import ConfigError, did_you_mean
from veneer.units import format_bytes

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
    device: DeviceName = "auto",
    storage: KeptIn = None,
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
    from veneer.disk.adapter_dir import read_facts
    from veneer.merge.fold import refuse_taken
    from veneer.merge.verified_merge import merge_and_verify, verification_prompts

    if dtype not in DTYPES:
        raise ConfigError(
            f"--dtype {dtype}: there is no such dtype{did_you_mean(dtype, DTYPES)} Known: {', '.join(DTYPES)}."
        )
    refuse_taken(into, Path(model))
    kept = storage_for([adapter], storage)
    # in float32, so that what is compared is the fold, not the rounding of sums
    base = load_model(model, storage=kept, device=device, dtype="float32", say=remark)
    attached = load_adapter(base, adapter, allow_other_base=allow_other_base)
    templates = {"prompt": prompt, "completion": ""} if prompt is not None else {}
    try:
        given = {"format": format, **templates}
        prompts = verification_prompts(base, read_facts(adapter), data, rows=rows, say=remark, **given)
    except ConfigError as error:
        where = f"the recipe in {adapter / 'veneer.json'}, or --prompt and --format"
        raise ConfigError(f"{where}: {error}; data=FILE names other rows") from None
    written_in = None if dtype == "keep" else TORCH_DTYPES[dtype]
    merged = merge_and_verify(base, attached, into, prompts, dtype=written_in, say=remark)
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
    say("\n".join(lines))
