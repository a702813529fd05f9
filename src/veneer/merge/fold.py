"""Fold an adapter into its base model's files, tensor by tensor.

Each weight is folded in float32 from the base on disk and rounded once, to the base's own dtype or the one asked for.
Memory is one tensor, not one model. Tied weights are untied where the fold makes them differ: an adapter on the input
embedding does not change the output head, nor the other way round.

Where the model keeps weights quantized, the merged folder is dense and holds them dequantized, with the adapter folded
into those: they are what the adapter was trained on. The base's own weights differ from them by the quantization error.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layer_view import dense_weight, is_transposed
from veneer.adapters.part import Fold
from veneer.base.device import Device
from veneer.base.fingerprint import OWN_ROWS
from veneer.base.quantize import packed_names
from veneer.base.vocabulary import with_rows
from veneer.disk.atomic import replacing_folder
from veneer.disk.model_dir import copy_settings
from veneer.disk.tensors import Spec, Tensors, open_tensors, write_model_tensors
from veneer.errors import ConfigError, ModelError, NotFoldable, listed
from veneer.models.blocks import name_in_files
from veneer.storage.layers import Stored


@dataclass(frozen=True)
class Source:
    """Where one tensor of the merged model comes from."""

    stored: str
    """Its name in the base's files."""
    fold: Fold | None = None
    name: str = ""
    """Of the parameter that is folded into."""
    rows: int | None = None
    """The first dimension of a weight whose vocabulary has grown; rows are added as the mean of the others."""


def merge(
    adapter: Adapter,
    base: Path,
    into: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `base` with `adapter` folded in as a model folder that transformers loads; returns its bytes.

    adapter     on the model that was loaded from `base` (attached or not)
    dtype       of the floating-point tensors; None keeps each tensor's own
    progress    is told how many tensors of how many are written
    Raises ConfigError if `into` is taken, NotFoldable by name, ModelError if a target's weight is not in the files, and
    DiskError from writing; nothing is left of `into` then.
    """
    refuse_taken(into, base)
    refuse_unfoldable(adapter)
    tensors = open_tensors(base)
    stored = tensors.without(n for names in packed_names(tensors).values() for n in names[1:])
    kept = _kept(adapter.base.network, stored)
    plan, untied = _plan(adapter, stored)
    specs = {name: _spec(stored, source, dtype, kept) for name, source in plan.items()}
    with replacing_folder(into) as folder:
        copy_settings(base, folder)
        grown = any(source.rows is not None for source in plan.values())
        _adjust_config(folder / "config.json", untied, dtype, adapter.base.vocab_size if grown else None)
        if adapter.new_tokens:
            adapter.base.tokenizer.save_pretrained(folder)
        write_model_tensors(folder, specs, _folded(plan, stored, specs, kept, adapter.base.device, progress))
    return sum(f.stat().st_size for f in into.iterdir())


def refuse_taken(into: Path, base: Path) -> None:
    """Raise ConfigError if a merged model must not be written to `into`."""
    if into.resolve() == base.resolve():
        raise ConfigError(f"{into} is the base model itself; merge into a new folder")
    if into.exists() or into.is_symlink():
        raise ConfigError(f"{into} exists already; merge into a new folder, or remove that one")
    above = next(p for p in into.absolute().parents if p.exists())
    if not above.is_dir():
        raise ConfigError(f"{into} cannot be written: {above} is a file; merge into a new folder elsewhere")


def refuse_unfoldable(adapter: Adapter) -> None:
    """Raise NotFoldable, before any weight is read, for a prompt and for methods that are no change of one weight."""
    for part in adapter.parts:
        try:
            part.refuse_fold()
        except NotFoldable as error:
            folders = {p.folder for p in adapter.parts} - {part.folder}
            alone = "".join(f"; the part in its folder `{folder}` can be merged without it" for folder in folders)
            whole = f"{adapter.kind}: " if part.folder == "prompt" else ""
            raise _not_foldable(f"{whole}{error}{alone}") from error


def _not_foldable(why: str) -> NotFoldable:
    return NotFoldable(
        f"{why}. Nothing was written. Keep the adapter beside its model: `veneer generate MODEL --adapter "
        "DIR` and `veneer chat` use it so."
    )


def _plan(adapter: Adapter, stored: Tensors) -> tuple[dict[str, Source], bool]:
    """Every tensor of the merged model by name, and whether tied weights now differ."""
    network = adapter.base.network
    plan = {name: Source(name) for name in stored}
    folds = {name: fold for part in adapter.parts for name, fold in part.folds().items()}
    names_of, untied, missing = _tied(network), False, []
    for name in folds:
        group = names_of.get(name, [name])
        own = {n: name_in_files(network, n, stored) for n in group}
        home = next((n for n in own.values() if n is not None), None)
        if home is None:
            missing += [] if name.endswith(".bias") else [name]
            continue
        by_name = _folds_of(group, folds, network)
        alike = all(fold == folds[name] for fold in by_name.values())
        untied |= not alike
        for other, fold in by_name.items():
            if (place := own[other]) is not None or not alike:
                plan[place or other] = Source(place or home, fold, other)
    if missing:
        raise ModelError(
            f"the base's files hold no {listed(missing, 4, ', ')}, so nothing can be folded "
            f"into it; they hold {', '.join(list(stored)[:4])}, ... Give the folder that the model was loaded from."
        )
    for name, parameter in network.named_parameters(remove_duplicate=False):
        place = name_in_files(network, name, plan)
        if hasattr(parameter, OWN_ROWS) and place is not None:
            plan[place] = replace(plan[place], rows=len(parameter))
    return plan, untied


def _folds_of(group: Sequence[str], folds: Mapping[str, Fold], network: nn.Module) -> dict[str, Fold | None]:
    """The fold of each name of one parameter; a module that stands in several places is folded in all of them."""
    by_module = {id(network.get_submodule(n.rpartition(".")[0])): folds[n] for n in group if n in folds}
    return {n: by_module.get(id(network.get_submodule(n.rpartition(".")[0]))) for n in group}


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> every name of that same tensor, for tensors with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Stored):
            names.setdefault(id(module.storage), []).append(f"{path}.weight")
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _kept(model: nn.Module, stored: Tensors) -> dict[str, Stored]:
    """Name in the files -> the module that keeps this weight quantized."""
    modules = ((path, m) for path, m in model.named_modules() if isinstance(m, Stored) and m.saved)
    return {name: m for path, m in modules if (name := name_in_files(model, f"{path}.weight", stored)) is not None}


def _spec(stored: Tensors, source: Source, dtype: torch.dtype | None, kept: Mapping[str, Stored]) -> Spec:
    name = source.stored
    own, shape = stored[name].dtype, stored[name].shape
    if name in kept and not own.is_floating_point:
        o, d = kept[name].storage.shape
        own, shape = kept[name].storage.dtype, (d, o) if getattr(kept[name], "transposed", False) else (o, d)
    if source.rows is not None:
        shape = (source.rows, *shape[1:])
    return (dtype if dtype is not None and own.is_floating_point else own, shape)


def _folded(
    plan: Mapping[str, Source],
    stored: Tensors,
    specs: Mapping[str, Spec],
    kept: Mapping[str, Stored],
    device: Device,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    for done, (name, source) in enumerate(plan.items(), start=1):
        tensor = _dequantized(kept[source.stored]) if source.stored in kept else stored.read(source.stored)
        if source.rows is not None or source.fold is not None:
            tensor = _changed(tensor.to(device.torch_device, torch.float32), source)
        yield name, tensor.to(specs[name][0]).contiguous()
        del tensor  # before the next one is read
        progress(done, len(plan))


def _dequantized(module: Stored) -> Tensor:
    """The weight as a dense model has it, float32."""
    w = dense_weight(module)
    return w.T if is_transposed(module) else w


@torch.no_grad()  # here, not on the generator: its wrapper would keep the last tensor while the next is made
def _changed(tensor: Tensor, source: Source) -> Tensor:
    """A stored weight or bias, float32, grown and with its change folded in."""
    if source.rows is not None:
        tensor = with_rows(tensor, source.rows)
    try:
        return tensor if source.fold is None else source.fold(tensor)
    except NotFoldable as error:
        raise _not_foldable(f"{source.name.rpartition('.')[0]}: {error}") from error


def _adjust_config(file: Path, untied: bool, dtype: torch.dtype | None, vocab_size: int | None) -> None:
    """Say in config.json what the fold has changed: weights that are tied or quantized no longer, dtype, vocabulary.

    transformers loads into the dtype that stands there, so a stale one would round the weights again.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if vocab_size is not None and "vocab_size" in part:
            part["vocab_size"] = vocab_size
        names = [key for key in ("dtype", "torch_dtype") if key in part]
        if dtype is not None:
            part |= dict.fromkeys(names or (["dtype"] if part is config else []), str(dtype).removeprefix("torch."))
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
