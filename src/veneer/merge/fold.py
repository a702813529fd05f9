"""Fold an adapter into its base model's files, tensor by tensor.

Each weight is folded in float32 from the base on disk and rounded once, to the base's own dtype or the one asked for.
Memory is one tensor, not one model. Tied weights are untied where the fold makes them differ: an adapter on the input
embedding does not change the output head, nor the other way round.

Where the model keeps weights quantized, the merged folder is dense and holds them dequantized, with the adapter folded
into those: they are what the adapter was trained on. The base's own weights differ from them by the quantization error.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layer_view import dense_weight, is_transposed
from veneer.base.quantize import packed_names
from veneer.disk.atomic import replacing_folder
from veneer.disk.tensors import Spec, Tensors, open_tensors, write_model_tensors
from veneer.errors import ConfigError, ModelError, NotFoldable
from veneer.methods.base import Delta
from veneer.storage.layers import Stored

COPIED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*")
"""What a merged folder takes over from the base: configuration and tokenizer, not weights."""


@dataclass(frozen=True)
class Source:
    """Where one tensor of the merged model comes from."""

    stored: str
    """Its name in the base's files."""
    delta: Delta | None = None
    transposed: bool = False
    """Whether the files hold W as (D, O)."""
    bias: bool = False
    path: str = ""
    """The module that the delta hangs on."""


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
    kept = _kept(adapter.model, stored)
    plan, untied = _plan(adapter, stored)
    specs = {name: _spec(stored, source.stored, dtype, kept) for name, source in plan.items()}
    with replacing_folder(into) as folder:
        _copy_rest(base, folder)
        _adjust_config(folder / "config.json", untied, dtype)
        write_model_tensors(folder, specs, _folded(plan, stored, specs, kept, progress))
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
    model = adapter.model
    plan = {name: Source(name) for name in stored}
    names_of = _tied(model)
    untied = False
    missing = []
    for path, delta in adapter.deltas.items():
        module = model.get_submodule(path)
        every = names_of.get(f"{path}.weight", [f"{path}.weight"])
        home = next((own for n in every if (own := _stored_name(n, stored, model)) is not None), None)
        if home is None:
            missing.append(f"{path}.weight")
            continue
        for name in every:
            same = model.get_submodule(name.rpartition(".")[0]) is module  # one module in several places
            own = _stored_name(name, stored, model)
            if same and (own is not None or name == f"{path}.weight"):
                plan[own or name] = Source(own or home, delta, is_transposed(module), path=path)
            elif not same:
                untied = True
                plan.setdefault(own or name, Source(home))
        for name in names_of.get(f"{path}.bias", [f"{path}.bias"]):
            if (own := _stored_name(name, stored, model)) is not None:
                plan[own] = Source(own, delta, bias=True, path=path)
    if missing:
        raise ModelError(
            f"the base's files hold no {', '.join(missing[:4])} ({len(missing)} in all), so nothing can be folded "
            f"into it; they hold {', '.join(list(stored)[:4])}, ... Give the folder that the model was loaded from."
        )
    return plan, untied


def _stored_name(name: str, stored: Mapping[str, Any], model: Any) -> str | None:
    """The name in the files of a parameter of the model; files of headless models lack the prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in stored:
            return candidate
    return None


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
    return {name: m for path, m in modules if (name := _stored_name(f"{path}.weight", stored, model)) is not None}


def _spec(stored: Tensors, name: str, dtype: torch.dtype | None, kept: Mapping[str, Stored]) -> Spec:
    own, shape = stored[name].dtype, stored[name].shape
    if name in kept and not own.is_floating_point:
        o, d = kept[name].storage.shape
        own, shape = kept[name].storage.dtype, (d, o) if getattr(kept[name], "transposed", False) else (o, d)
    return (dtype if dtype is not None and own.is_floating_point else own, shape)


def _folded(
    plan: Mapping[str, Source],
    stored: Tensors,
    specs: Mapping[str, Spec],
    kept: Mapping[str, Stored],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    for done, (name, source) in enumerate(plan.items(), start=1):
        tensor = _dequantized(kept[source.stored]) if source.stored in kept else stored.read(source.stored)
        if source.delta is not None:
            tensor = _changed(tensor.float(), source, source.delta)
        yield name, tensor.to(specs[name][0]).contiguous()
        del tensor  # before the next one is read
        progress(done, len(plan))


def _dequantized(module: Stored) -> Tensor:
    """The weight as a dense model has it, float32."""
    w = dense_weight(module)
    return w.T if is_transposed(module) else w


@torch.no_grad()  # here, not on the generator: its wrapper would keep the last tensor while the next is made
def _changed(tensor: Tensor, source: Source, delta: Delta) -> Tensor:
    """A stored weight or bias, float32, with its delta folded in."""
    if source.bias:
        return delta.fold_bias(tensor)
    try:
        folded = delta.fold(tensor.T if source.transposed else tensor)
    except NotFoldable as error:
        raise _not_foldable(f"{source.path}: {error}") from error
    return folded.T if source.transposed else folded


def _copy_rest(base: Path, folder: Path) -> None:
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.is_file() and not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)


def _adjust_config(file: Path, untied: bool, dtype: torch.dtype | None) -> None:
    """Say in config.json what the fold has changed: weights that are tied or quantized no longer, and their dtype.

    transformers loads into the dtype that stands there, so a stale one would round the weights again.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        names = [key for key in ("dtype", "torch_dtype") if key in part]
        if dtype is not None:
            part |= dict.fromkeys(names or (["dtype"] if part is config else []), str(dtype).removeprefix("torch."))
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
