"""Write an adapter in a form that other programs read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.console import AllowOtherBase, AsJson, DeviceName, Model, emit_json, remark, say, stderr
from veneer.errors import ConfigError, did_you_mean
from veneer.units import format_bytes

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.merge.export import AsLoRA

FORMS = {
    "peft": "the method's own folder, as PEFT loads it",
    "lora": "a plain LoRA folder, for PEFT, vLLM and other servers",
    "gguf": "a LoRA file for llama.cpp",
    "gguf-model": "MODEL, with the adapter folded in if one is given, as a file for llama.cpp",
}


def command(
    model: Model,
    to: Annotated[str, typer.Option(metavar="FORM", help="; ".join(f"{k}: {v}" for k, v in FORMS.items()) + ".")],
    into: Annotated[Path, typer.Option(metavar="PATH", help="The folder (gguf: file) to write; must not exist yet.")],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="The adapter's folder.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="lora, gguf: of the nearest LoRA where none is equal; by default the equal one.")
    ] = None,
    device: DeviceName = "auto",
    allow_other_base: AllowOtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in a form that other programs read.

    LoRA with any init, AdaLoRA and MoRA with sharing become an equal LoRA; any other
    change of weights (MoRA with rotation, DoRA, full) the nearest LoRA of --rank, and what it loses is printed.
    Example:

        veneer export smollm2-135m-instruct --adapter runs/mora/adapter --to lora --into exports/mora --rank 64
    """
    from veneer.merge.fold import refuse_unfoldable
    from veneer.merge.gguf_adapter import write_gguf_adapter

    _refuse(to, into, rank)
    if to == "gguf-model":
        written = _whole_model(model, adapter, into, device, allow_other_base)
        if as_json:
            emit_json({"path": str(into), "bytes": written, "to": to})
        else:
            say(f"exported: {into} ({format_bytes(written)})")
        return
    if adapter is None:
        raise ConfigError(f"--to {to} exports an adapter: name its folder with --adapter")
    trained = _loaded(model, adapter, device, allow_other_base)
    if to == "peft":
        _refuse_unknown_to_peft(trained)
        result: dict[str, Any] = {"path": str(into), "bytes": trained.save(into), "to": to}
        said = ""
    else:
        refuse_unfoldable(trained)
        made = _as_lora(trained, rank)
        written = made.adapter.save(into) if to == "lora" else write_gguf_adapter(made.adapter, into)
        worst = max(made.errors, key=made.errors.__getitem__)
        rank = getattr(made.adapter.settings, "rank")  # noqa: B009 (a MethodConfig need not have one; LoRA's has)
        result = {"path": str(into), "bytes": written, "to": to, "rank": rank, "exact": made.exact}
        result["error"] = made.errors[worst]
        equal = f"equal to the {trained.kind} adapter"
        loses = f"not equal: it loses at most {made.errors[worst]:.2%} of an update ({worst})"
        said = f", LoRA of rank {result['rank']}, {equal if made.exact else loses}"
    if as_json:
        emit_json(result)
        return
    say(f"exported: {into} ({format_bytes(result['bytes'])}){said}")


def _loaded(model: str, adapter: Path, device: str, allow_other_base: bool) -> "Adapter":
    """The adapter, attached to the model in float32, kept as it was when the adapter was trained."""
    from veneer.adapters.attach import load_adapter
    from veneer.base.load import load_model
    from veneer.base.storage_config import storage_for

    base = load_model(model, storage=storage_for([adapter], None), device=device, dtype="float32", say=remark)
    return load_adapter(base, adapter, allow_other_base=allow_other_base)


def _whole_model(model: str, adapter: Path | None, into: Path, device: str, allow_other_base: bool) -> int:
    """Write the model, merged with the adapter, as GGUF; the merged folder lies beside it meanwhile."""
    from tempfile import TemporaryDirectory

    from veneer.merge.fold import merge
    from veneer.merge.gguf_model import write_gguf_model
    from veneer.models.sources import resolve

    name = Path(model).name
    if adapter is None:
        return write_gguf_model(resolve(model), into, name)
    trained = _loaded(model, adapter, device, allow_other_base)
    with TemporaryDirectory(dir=into.absolute().parent) as beside:
        merge(trained, trained.base.files, Path(beside) / "merged")
        return write_gguf_model(Path(beside) / "merged", into, name)


def _refuse(to: str, into: Path, rank: int | None) -> None:
    if to not in FORMS:
        raise ConfigError(f"--to {to}: there is no such form{did_you_mean(to, FORMS)} Known: {', '.join(FORMS)}.")
    if into.exists() or into.is_symlink():
        raise ConfigError(f"{into} exists already; export to a new path, or remove that one")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1, got {rank}")
    if rank is not None and to not in ("lora", "gguf"):
        raise ConfigError(f"--rank is of --to lora and gguf; --to {to} writes the adapter as it is")


def _refuse_unknown_to_peft(trained: "Adapter") -> None:
    if len({part.folder for part in trained.parts}) > 1:
        raise ConfigError(
            f"{trained.kind} is two adapters to PEFT: export the folders `method` and `prompt` inside it one by one"
        )
    if trained.settings is None:
        return
    fields = type(next(iter(trained.deltas.values()))).to_peft(trained.settings)
    rows = any(part.kind == "trained tokens" for part in trained.parts)
    known = ("LORA", "ADALORA") if rows else ("LORA", "IA3", "ADALORA")
    if fields["peft_type"] not in known or fields.get("use_mora"):
        raise ConfigError(f"PEFT has no word for {trained.kind}; --to lora makes a LoRA of it, where that can be")


def _as_lora(adapter: "Adapter", rank: int | None) -> "AsLoRA":
    from veneer.data.progress import showing
    from veneer.merge.export import as_lora

    with showing("layers", len(adapter.deltas), stderr) as advance:
        return as_lora(adapter, rank, progress=lambda: advance(1))
