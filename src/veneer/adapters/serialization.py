"""Adapters to and from the plain data of an adapter folder, under PEFT's names; nothing lands silently wrong."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.adapters.layer_view import frozen_layer, is_transposed
from veneer.adapters.targets import ALL_LINEAR, Targeting, all_matching, matching
from veneer.base.fingerprint import base_fingerprint
from veneer.base.storage_config import DENSE, base_storage, storage_of
from veneer.disk.adapter_dir import AdapterFiles
from veneer.errors import AdapterMismatch, ConfigError, NotFoldable
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig
from veneer.methods.restartable import restartable

if TYPE_CHECKING:
    from veneer.adapters.attach import Adapter

PREFIX = "base_model.model."
FORMAT = 1
"""Of veneer.json; a folder with a higher one is refused."""
TRUSTED = 2**24
"""Numbers in a delta that are allocated because adapter_config.json says so, before the tensors are compared."""


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
    restarted = next(iter(restartable(adapter.deltas).values()), None)
    settings = adapter.config if restarted is None else restarted.now(adapter.config)
    config = {
        **method.to_peft(settings),
        "base_model_name_or_path": adapter.base or None,
        "target_modules": _target_modules(adapter),
        "exclude_modules": None,
        "layers_to_transform": None,
        "fan_in_fan_out": _all_transposed(adapter),
        "modules_to_save": None,
        "task_type": _task_type(adapter.model),
        "inference_mode": True,
    }
    own: dict[str, Any] = {
        "format": FORMAT,
        "method": adapter.config.method,
        "scales": {p: d.scale for p, d in adapter.deltas.items() if isinstance(getattr(d, "scale", None), float)},
        "roles": dict(method.roles),
        "base": base_facts(adapter.model, adapter.base),
    }
    return AdapterFiles(config, tensors, {**own, **facts})


def base_facts(model: nn.Module, name: str) -> dict[str, Any]:
    """What veneer.json says of the model that was trained on: its name, its weights and how they were kept."""
    facts: dict[str, Any] = {"name": name, "fingerprint": base_fingerprint(model)}
    if (storage := storage_of(model)) is not None:
        facts["storage"] = storage.settings
    return facts


def refuse_newer(files: AdapterFiles, where: str) -> None:
    """Raise AdapterMismatch for a folder of a later veneer."""
    newer = files.facts.get("format", FORMAT)
    if not isinstance(newer, int) or newer > FORMAT:
        raise AdapterMismatch(f"{where}: veneer.json has format {newer!r}, known here is {FORMAT}; update veneer")


def read_into(
    model: nn.Module, files: AdapterFiles, where: str, *, allow_other_base: bool, allow_no_effect: bool
) -> LoadedDeltas:
    """Deltas for `model` from an adapter folder's content; every difference is reported at once."""
    config, targeting = _settings(files, where)
    paths = matching(model, targeting, "module" in METHODS[config.method].kinds)
    by_path, strays = _by_path(files.tensors, paths)
    problems = [*other_base(model, files, allow_other_base), *_strays(model, strays)]
    deltas: dict[str, Delta] = {}
    layers: dict[str, FrozenLayer] = {}
    for path in paths:
        layer = frozen_layer(model.get_submodule(path), blocks=True)
        assert layer is not None, f"{path} was matched as a layer"
        try:
            delta = _delta(path, layer, config, by_path.get(path, {}))
        except (AdapterMismatch, ConfigError) as error:
            problems += [f"  {path}.{line}" for line in str(error).splitlines()]
        else:
            layers[path], deltas[path] = layer, delta
    if not paths:
        problems.append(f"  its targets {targeting.targets!r} match no layer of the model")
    if not problems and not allow_no_effect and not any(_has_effect(d, layers[p]) for p, d in deltas.items()):
        problems.append("  it changes nothing: every delta is zero (an untrained adapter?)")
    if problems:
        raise AdapterMismatch(_report(where, model, files, problems))
    return LoadedDeltas(config, targeting, deltas)


def _delta(path: str, layer: FrozenLayer, config: MethodConfig, tensors: Mapping[str, Tensor]) -> Delta:
    """One layer's delta with its saved tensors; raises AdapterMismatch or ConfigError, one line per difference."""
    method, own = METHODS[config.method], config.at(path)
    if layer.kind not in method.kinds:
        raise AdapterMismatch(f"weight: a layer of kind {layer.kind}, which {config.method} cannot change")
    stored = sum(t.numel() for t in tensors.values())
    if method.n_params(layer, own) > max(stored, TRUSTED):
        raise AdapterMismatch(f"*: its settings ask for {method.n_params(layer, own)} numbers, it holds {stored}")
    delta = method(layer, own, torch.Generator().manual_seed(0))
    delta.load_(tensors)
    return delta


def _settings(files: AdapterFiles, where: str) -> tuple[MethodConfig, Targeting]:
    """The method's settings and the targets; raises AdapterMismatch for a file that cannot be understood."""
    refuse_newer(files, where)
    fields = files.config
    try:
        targeting = Targeting(
            targets=_as_targets(fields, "target_modules"),
            exclude=_as_targets(fields, "exclude_modules"),
            layers=_as_layers(fields),
            blocks=_as_blocks(fields),
        )
        for name in METHODS:
            config = METHODS[name].from_peft(fields)
            if config is not None:
                return config, targeting
    except (AdapterMismatch, ConfigError) as error:
        raise AdapterMismatch(f"{where}/adapter_config.json: {error}") from error
    kind = fields.get("peft_type")
    raise AdapterMismatch(f"{where}: peft_type {kind!r} is of no method known here; known: {', '.join(METHODS)}")


def _report(where: str, model: nn.Module, files: AdapterFiles, problems: list[str], most: int = 20) -> str:
    more = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    base = files.config.get("base_model_name_or_path") or "the model it was trained on"
    many = "1 difference" if len(problems) == 1 else f"{len(problems)} differences"
    head = f"adapter {where} does not fit this {type(model).__name__}; {many}:"
    return "\n".join([head, *problems[:most], *more, f"Nothing was loaded. Its base model is {base}."])


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
    own = dict(model.named_parameters(remove_duplicate=False))
    problems = []
    for key, tensor in strays.items():
        base = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is None:
            problems.append(f"  {key}: in the adapter, not in the model")
        elif not _same_weight(tensor, base):
            problems.append(f"  {key}: the adapter brings its own base weight, which differs from the model's")
    return problems


def _same_weight(a: Tensor, b: Tensor) -> bool:
    """Equal but for the precision they are kept in: compared, as in the fingerprint, after rounding to bfloat16."""
    return a.shape == b.shape and torch.equal(a.to(b.device, torch.bfloat16), b.detach().to(torch.bfloat16))


def other_base(model: nn.Module, files: AdapterFiles, allowed: bool) -> list[str]:
    """A complaint if the model's weights are not those that the adapter was trained on."""
    base = files.facts.get("base")
    trained_on = base.get("fingerprint") if isinstance(base, dict) else None
    if trained_on is None or allowed or trained_on == base_fingerprint(model):
        return []
    then, now = base.get("storage") if isinstance(base, dict) else None, storage_of(model)
    try:
        trained = base_storage(then) if isinstance(then, dict) else None
    except ConfigError as error:
        return [f"  its base was kept in a storage that is not known here: {error}"]
    if trained != now:
        kept = f"kept as {trained or DENSE}, those here are kept as {now or DENSE}"
        return [f"  the base model's weights it was trained on were {kept} (--allow-other-base loads it all the same)"]
    return ["  the base model's weights are not those it was trained on (--allow-other-base loads it all the same)"]


@torch.no_grad()
def _has_effect(delta: Delta, layer: FrozenLayer) -> bool:
    """Whether folding the delta in would change the layer's weight or bias."""
    try:
        w = layer.weight()
        if not torch.equal(delta.fold(w), w):
            return True
        bias = layer.bias() if layer.bias is not None else None
        return bias is not None and not torch.equal(delta.fold_bias(bias), bias)
    except NotFoldable:
        return any(bool(torch.count_nonzero(p)) for p in delta.parameters())


def _target_modules(adapter: "Adapter") -> str | list[str]:
    """What PEFT should read: a regular expression as given, else the shortest endings that name the same modules.

    PEFT fails on a matched module that is no layer, so only what names the chosen layers and nothing else will do.
    """
    given, model, chosen = adapter.targeting.targets, adapter.model, list(adapter.deltas)
    if isinstance(given, str) and given != ALL_LINEAR and all_matching(model, given) == chosen:
        return given
    endings = sorted({p.rpartition(".")[2] for p in chosen})
    for names in (endings, chosen):
        if all_matching(model, names) == chosen:
            return names
    return "|".join(re.escape(path) for path in chosen)


def _task_type(model: nn.Module) -> str | None:
    """The class of PEFT's that AutoPeftModel should wrap the model in, for models that generate."""
    if not hasattr(model, "lm_head") or not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _all_transposed(adapter: "Adapter") -> bool:
    modules = [adapter.model.get_submodule(p) for p in adapter.deltas]
    return all(is_transposed(m) and not isinstance(m, nn.Embedding) for m in modules)


def _as_targets(fields: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = fields.get(name)
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise AdapterMismatch(f"{name} {value!r} is not a regular expression: {error}") from error
        return value
    return _strings(value, name)


def _as_layers(fields: Mapping[str, Any]) -> tuple[int, ...]:
    value = fields.get("layers_to_transform")
    numbers = [value] if isinstance(value, int) else value or []
    if not isinstance(numbers, list) or not all(isinstance(n, int) for n in numbers):
        raise AdapterMismatch(f"layers_to_transform should be a list of numbers, but is {value!r}")
    return tuple(numbers)


def _as_blocks(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("layers_pattern")
    return _strings([value] if value and isinstance(value, str) else value, "layers_pattern")


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value or [], list) or not all(isinstance(v, str) for v in value or []):
        raise AdapterMismatch(f"{name} should be a list of module names, but is {value!r}")
    return tuple(value or ())
