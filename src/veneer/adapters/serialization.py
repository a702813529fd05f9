"""Parts to and from the plain data of an adapter folder, under PEFT's names; nothing is loaded silently wrong."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.deltas import DeltaPart
from veneer.adapters.layer_view import frozen_layer
from veneer.adapters.part import PREFIX, Part
from veneer.adapters.targets import Targeting, matching
from veneer.adapters.trained_modules import is_inside, read_trained_modules
from veneer.adapters.trained_tokens import read_trained_tokens
from veneer.adapters.virtual_tokens import KEY, VirtualTokens, config_of_prompt, new_virtual_tokens
from veneer.base.base import Base
from veneer.base.storage_config import DENSE, base_storage
from veneer.disk.adapter_dir import AdapterFiles
from veneer.errors import AdapterMismatch, ConfigError, NotFoldable
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig
from veneer.prompts.base import PROMPTS, PromptConfig

FORMAT = 1
"""Of veneer.json; a folder with a higher one is refused."""
TRUSTED = 2**24
"""Numbers in a delta that are allocated because adapter_config.json says so, before the tensors are compared."""


def to_files(
    parts: Sequence[Part], base_name: str, new_tokens: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, AdapterFiles]:
    """The content of each folder, by its name: PEFT's configuration and tensors, and our own facts beside them.

    An adapter with new tokens has the tokenizer that knows them in its first folder.
    """
    files: dict[str, AdapterFiles] = {}
    base, tokenizer = base_facts(parts[0].base, base_name), parts[0].base.tokenizer
    if new_tokens:
        facts = {"new_tokens": list(new_tokens), **facts}
    for folder in dict.fromkeys(part.folder for part in parts):
        config: dict[str, Any] = {}
        own: dict[str, Any] = {"format": FORMAT}
        tensors: dict[str, Tensor] = {}
        for part in (p for p in parts if p.folder == folder):
            config, own, tensors = config | part.peft_fields(), own | part.facts(), tensors | part.tensors()
        config["base_model_name_or_path"] = base_name or None
        beside = tokenizer.save_pretrained if new_tokens and tokenizer is not None and not files else None
        files[folder] = AdapterFiles(config, tensors, {**own, "base": base, **facts}, beside)
    return files


def base_facts(base: Base, name: str) -> dict[str, Any]:
    """What veneer.json says of the base that was trained on: its name, its weights and their storage."""
    facts: dict[str, Any] = {"name": name, "fingerprint": base.fingerprint}
    if (storage := base.storage) is not None:
        facts["storage"] = storage.settings
    return facts


def read_parts(
    base: Base, files: AdapterFiles, where: str, *, allow_other_base: bool, allow_no_effect: bool
) -> list[Part]:
    """The parts that an adapter folder holds, for `base`; raises AdapterMismatch with every difference."""
    if (prompt := config_of_prompt(files.config)) is not None:
        return [_read_virtual_tokens(base, files, where, prompt, allow_other_base)]
    return _read_method(base, files, where, allow_other_base, allow_no_effect)


def _read_virtual_tokens(
    base: Base, files: AdapterFiles, where: str, config: PromptConfig, allow_other_base: bool
) -> VirtualTokens:
    if set(files.tensors) != {KEY}:
        raise AdapterMismatch(
            f"{where} holds no prompt: peft_type {files.config.get('peft_type')!r} with {', '.join(files.tensors)}; "
            f"wanted is one tensor {KEY} of a {' or '.join(PROMPTS)}"
        )
    _refuse_newer(files, where)
    if problems := _other_base(base, files, allow_other_base):
        raise AdapterMismatch(f"prompt {where} does not fit this {base.kind}:\n{problems[0]}")
    part = new_virtual_tokens(base, config, seed=0)
    try:
        part.prompt.load_(files.tensors[KEY])
    except AdapterMismatch as error:
        raise AdapterMismatch(f"{where}: {error}") from error
    return part


def _refuse_newer(files: AdapterFiles, where: str) -> None:
    """Raise AdapterMismatch for a folder of a later veneer."""
    newer = files.facts.get("format", FORMAT)
    if not isinstance(newer, int) or newer > FORMAT:
        raise AdapterMismatch(f"{where}: veneer.json has format {newer!r}, known here is {FORMAT}; update veneer")


def _read_method(
    base: Base, files: AdapterFiles, where: str, allow_other_base: bool, allow_no_effect: bool
) -> list[Part]:
    network = base.network
    config, targeting = _settings(files, where)
    modules, used, wrong = read_trained_modules(base, files)
    rest = replace(files, tensors={k: t for k, t in files.tensors.items() if k not in used})
    rows, more, also_wrong = read_trained_tokens(base, rest)
    others: list[Part] = [part for part in (modules, rows) if part is not None]
    whole = [] if modules is None else modules.names
    paths = matching(network, targeting, "module" in METHODS[config.method].kinds)
    paths = [path for path in paths if not is_inside(path, whole)]
    by_path, strays = _by_path({k: t for k, t in rest.tensors.items() if k not in more}, paths)
    problems = [*_other_base(base, files, allow_other_base), *wrong, *also_wrong, *_strays(network, strays)]
    deltas: dict[str, Delta] = {}
    layers: dict[str, FrozenLayer] = {}
    for path in paths:
        layer = frozen_layer(network.get_submodule(path), blocks=True)
        assert layer is not None, f"{path} was matched as a layer"
        try:
            delta = _delta(path, layer, config, by_path.get(path, {}))
        except (AdapterMismatch, ConfigError) as error:
            problems += [f"  {path}.{line}" for line in str(error).splitlines()]
        else:
            layers[path], deltas[path] = layer, delta
    if not paths:
        problems.append(f"  its targets {targeting.targets!r} match no layer of the model")
    if problems or others or allow_no_effect:
        pass
    elif not any(_has_effect(d, layers[p]) for p, d in deltas.items()):
        problems.append("  it changes nothing: every delta is zero (an untrained adapter?)")
    if problems:
        raise AdapterMismatch(_report(where, base, files, problems))
    return [DeltaPart(base, config, targeting, deltas), *others]


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
    _refuse_newer(files, where)
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


def _report(where: str, base: Base, files: AdapterFiles, problems: list[str], most: int = 20) -> str:
    more = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    trained_on = files.config.get("base_model_name_or_path") or "the model it was trained on"
    many = "1 difference" if len(problems) == 1 else f"{len(problems)} differences"
    head = f"adapter {where} does not fit this {base.kind}; {many}:"
    return "\n".join([head, *problems[:most], *more, f"Nothing was loaded. Its base model is {trained_on}."])


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


def _other_base(base: Base, files: AdapterFiles, allowed: bool) -> list[str]:
    """A complaint if the base's weights are not those that the adapter was trained on."""
    facts = files.facts.get("base")
    trained_on = facts.get("fingerprint") if isinstance(facts, dict) else None
    if trained_on is None or allowed or trained_on == base.fingerprint:
        return []
    then, now = facts.get("storage") if isinstance(facts, dict) else None, base.storage
    try:
        trained = base_storage(then) if isinstance(then, dict) else None
    except ConfigError as error:
        return [f"  its base was kept in a storage that is not known here: {error}"]
    anyway = "(allow_other_base=True loads it all the same)"
    if trained != now:
        kept = f"kept as {trained or DENSE}, those here are kept as {now or DENSE}"
        return [f"  the base model's weights it was trained on were {kept} {anyway}"]
    return [f"  the base model's weights are not those it was trained on {anyway}"]


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
