"""Adapters to and from the plain data of an adapter folder, under PEFT's names; nothing lands silently wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.adapters.fingerprint import base_fingerprint
from veneer.adapters.frozen import frozen_layer, is_transposed
from veneer.adapters.targets import ALL_LINEAR, Targeting, matching
from veneer.disk.adapter_dir import AdapterFiles
from veneer.errors import AdapterMismatch, NotFoldable
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig

if TYPE_CHECKING:
    from veneer.adapters.attach import Adapter

PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoadedDeltas:
    """What an adapter folder became on a model."""

    config: MethodConfig
    targeting: Targeting
    deltas: dict[str, Delta]


def to_files(adapter: "Adapter", facts: Mapping[str, Any]) -> AdapterFiles:
    """The folder's content: PEFT's configuration, tensors under PEFT's keys, and our own facts beside them."""
    method = METHODS[adapter.config.method]
    tensors = {f"{PREFIX}{path}.{k}": t for path, d in adapter.deltas.items() for k, t in d.tensors().items()}
    settings = next(iter(adapter.deltas.values())).now(adapter.config) if adapter.deltas else adapter.config
    config = {
        **method.to_peft(settings),
        "base_model_name_or_path": adapter.base or None,
        "target_modules": _target_modules(adapter),
        "exclude_modules": None,
        "layers_to_transform": None,
        "fan_in_fan_out": _all_transposed(adapter),
        "modules_to_save": None,
        "task_type": "CAUSAL_LM" if hasattr(adapter.model, "lm_head") else None,
        "inference_mode": True,
    }
    own = {
        "format": 1,
        "method": adapter.config.method,
        "scales": {p: d.scale for p, d in adapter.deltas.items() if isinstance(getattr(d, "scale", None), float)},
        "roles": dict(method.roles),
        "base": {"name": adapter.base, "fingerprint": base_fingerprint(adapter.model)},
    }
    return AdapterFiles(config, tensors, {**own, **facts})


def read_into(
    model: nn.Module, files: AdapterFiles, where: str, *, allow_other_base: bool, allow_no_effect: bool
) -> LoadedDeltas:
    """Deltas for `model` from an adapter folder's content; every difference is reported at once."""
    config = _config(files.config, where)
    targeting = Targeting(
        targets=_as_targets(files.config.get("target_modules")),
        exclude=_as_targets(files.config.get("exclude_modules") or ()),
        layers=_as_layers(files.config.get("layers_to_transform")),
    )
    method = METHODS[config.method]
    paths = matching(model, targeting)
    rng = torch.Generator().manual_seed(0)
    by_path, strays = _by_path(files.tensors, paths)
    problems = [*_other_base(model, files, allow_other_base), *_strays(model, strays)]
    deltas: dict[str, Delta] = {}
    layers: dict[str, FrozenLayer] = {}
    for path in paths:
        layer = frozen_layer(model.get_submodule(path))
        if layer is None or layer.kind not in method.kinds:
            problems.append(f"  {path}: not a layer that {config.method} can change")
            continue
        layers[path], deltas[path] = layer, method(layer, config.at(path), rng)
        try:
            deltas[path].load_(by_path.get(path, {}))
        except AdapterMismatch as error:
            problems += [f"  {path}.{line}" for line in str(error).splitlines()]
    if not paths:
        problems.append(f"  its targets {targeting.targets!r} match no layer of the model")
    if not problems and not allow_no_effect and not any(_has_effect(d, layers[p]) for p, d in deltas.items()):
        problems.append("  it changes nothing: every delta is zero (an untrained adapter?)")
    if problems:
        raise AdapterMismatch(_report(where, model, files, problems))
    return LoadedDeltas(config, targeting, deltas)


def _report(where: str, model: nn.Module, files: AdapterFiles, problems: list[str], most: int = 20) -> str:
    more = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    base = files.config.get("base_model_name_or_path") or "the model it was trained on"
    head = f"adapter {where} does not fit this {type(model).__name__}; {len(problems)} differences:"
    return "\n".join([head, *problems[:most], *more, f"Nothing was loaded. Its base model is {base}."])


def _config(fields: Mapping[str, Any], where: str) -> MethodConfig:
    for name in METHODS:
        config = METHODS[name].from_peft(fields)
        if config is not None:
            return config
    kind = fields.get("peft_type")
    raise AdapterMismatch(f"{where}: peft_type {kind!r} is of no method known here; known: {', '.join(METHODS)}")


def _by_path(tensors: Mapping[str, Tensor], paths: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors sorted to the module they belong to, and those that belong to none; the longest path wins."""
    known = set(paths)
    sorted_: dict[str, dict[str, Tensor]] = {}
    strays: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        path = next((p for n in range(len(parts) - 1, 0, -1) if (p := ".".join(parts[:n])) in known), None)
        if path is None or not key.startswith(PREFIX) or ".base_layer." in key:
            strays[key] = tensor
        else:
            sorted_.setdefault(path, {})[".".join(parts[path.count(".") + 1 :])] = tensor
    return sorted_, strays


def _strays(model: nn.Module, strays: Mapping[str, Tensor]) -> list[str]:
    """Complaints about tensors without a delta; a copy of the base's own weight, as PEFT writes, is none."""
    problems = []
    for key, tensor in strays.items():
        path = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        own = dict(model.named_modules()).get(path) if key.endswith(".base_layer.weight") else None
        if own is None:
            problems.append(f"  {key}: in the adapter, not in the model")
        elif not torch.equal(tensor.to(own.get_parameter("weight").dtype), own.get_parameter("weight")):
            problems.append(f"  {key}: the adapter brings its own base weight, which differs from the model's")
    return problems


def _other_base(model: nn.Module, files: AdapterFiles, allowed: bool) -> list[str]:
    trained_on = files.facts.get("base", {}).get("fingerprint")
    if trained_on is None or allowed or trained_on == base_fingerprint(model):
        return []
    return ["  the base model's weights are not those it was trained on (--allow-other-base loads it all the same)"]


@torch.no_grad()
def _has_effect(delta: Delta, layer: FrozenLayer) -> bool:
    """Whether folding the delta in would change the layer's weight."""
    try:
        w = layer.weight()
        return not torch.equal(delta.fold(w), w)
    except NotFoldable:
        return any(bool(torch.count_nonzero(p)) for p in delta.parameters())


def _target_modules(adapter: "Adapter") -> str | list[str]:
    """What PEFT should read: a regular expression as given, else the shortest endings that name the same modules."""
    plain = not adapter.targeting.exclude and not adapter.targeting.layers
    if isinstance(adapter.targeting.targets, str) and adapter.targeting.targets != ALL_LINEAR and plain:
        return adapter.targeting.targets
    chosen = list(adapter.deltas)
    endings = tuple(sorted({p.rpartition(".")[2] for p in chosen}))
    return list(endings) if matching(adapter.model, Targeting(targets=endings)) == chosen else chosen


def _all_transposed(adapter: "Adapter") -> bool:
    modules = [adapter.model.get_submodule(p) for p in adapter.deltas]
    return all(is_transposed(m) and not isinstance(m, nn.Embedding) for m in modules)


def _as_targets(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _as_layers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value or ())
