"""Fold an adapter into its base model's files, tensor by tensor.

Each weight is folded in float32 from the base on disk and rounded once, to the base's own dtype or the one asked for.
Memory is one tensor, not one model. Tied weights are untied where the fold makes them differ: an adapter on the input
embedding does not change the output head, nor the other way round.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.attach import Adapter
from veneer.adapters.frozen import is_transposed
from veneer.disk.atomic import replacing_folder
from veneer.disk.tensors import Spec, Tensors, open_tensors, write_model_tensors
from veneer.errors import ConfigError, ModelError
from veneer.methods.base import Delta

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
"""What a merged folder takes over from the base: configuration and tokenizer, not weights."""


@dataclass(frozen=True)
class Source:
    """Where one tensor of the merged model comes from."""

    stored: str
    """Its name in the base's files."""
    delta: Delta | None = None
    transposed: bool = False
    bias: bool = False


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
    Raises NotFoldable by name, and ModelError if a target's weight is not in the files; `into` is then as it was.
    """
    if into.resolve() == base.resolve():
        raise ConfigError(f"{into} is the base model itself; merge into a folder of its own")
    stored = open_tensors(base)
    plan, untied = _plan(adapter, stored)
    specs = {name: _spec(stored, source.stored, dtype) for name, source in plan.items()}
    with replacing_folder(into) as folder:
        _copy_rest(base, folder, untied)
        write_model_tensors(folder, specs, _folded(plan, stored, specs, progress))
    return sum(f.stat().st_size for f in into.iterdir())


def _plan(adapter: Adapter, stored: Tensors) -> tuple[dict[str, Source], bool]:
    """Every tensor of the merged model by name, and whether tied weights now differ."""
    plan = {name: Source(name) for name in stored}
    shared = _tied(adapter.model)
    untied = False
    missing = []
    for path, delta in adapter.deltas.items():
        module = adapter.model.get_submodule(path)
        weight, bias = f"{path}.weight", f"{path}.bias"
        others = [n for n in shared.get(weight, ()) if n != weight]
        home = next((n for n in (weight, *others) if _stored_name(n, stored, adapter.model) is not None), None)
        if home is None and not hasattr(module, "weight"):
            delta.fold(torch.zeros(0))  # on a block of layers: raises NotFoldable by name
        if home is None:
            missing.append(weight)
            continue
        source = _stored_name(home, stored, adapter.model) or home
        if others:
            untied = True
            for name in others:
                plan.setdefault(_stored_name(name, stored, adapter.model) or name, Source(source))
        target = _stored_name(weight, stored, adapter.model) or weight
        plan[target] = Source(source, delta, is_transposed(module))
        if (own_bias := _stored_name(bias, stored, adapter.model)) is not None:
            plan[own_bias] = Source(own_bias, delta, bias=True)
    if missing:
        raise ModelError(
            f"the base's files hold no {', '.join(missing[:4])} ({len(missing)} in all), so nothing can be folded "
            f"into it; they hold {', '.join(list(stored)[:4])}, ..."
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
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _spec(stored: Tensors, name: str, dtype: torch.dtype | None) -> Spec:
    own = stored[name].dtype
    return (dtype if dtype is not None and own.is_floating_point else own, stored[name].shape)


@torch.no_grad()
def _folded(
    plan: Mapping[str, Source], stored: Tensors, specs: Mapping[str, Spec], progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Tensor]]:
    for done, (name, source) in enumerate(plan.items(), start=1):
        tensor = stored.read(source.stored)
        if source.delta is not None and source.bias:
            tensor = source.delta.fold_bias(tensor.float())
        elif source.delta is not None:
            w = tensor.float()
            w = source.delta.fold(w.T if source.transposed else w)
            tensor = w.T if source.transposed else w
        yield name, tensor.to(specs[name][0]).contiguous()
        progress(done, len(plan))


def _copy_rest(base: Path, folder: Path, untied: bool) -> None:
    for pattern in COPIED:
        for file in base.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)
    if untied:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
