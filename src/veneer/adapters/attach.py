"""Attach a new adapter to a base, or one from a folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.deltas import DeltaPart
from veneer.adapters.layer_view import layer_at
from veneer.adapters.part import Part
from veneer.adapters.serialization import read_part
from veneer.adapters.targets import ALL_LINEAR, Targeting, choose
from veneer.adapters.virtual_tokens import new_virtual_tokens
from veneer.base.base import Base
from veneer.base.device import Device
from veneer.disk.adapter_dir import parts_of, read_adapter, read_facts
from veneer.errors import AdapterMismatch, ConfigError
from veneer.methods.base import METHODS, MethodConfig, Watch, refuse_idle_patterns
from veneer.prompts.base import PromptConfig


def attach(
    base: Base | nn.Module,
    config: MethodConfig | None,
    targets: Targeting | str | tuple[str, ...] | None = None,
    *,
    prompt: PromptConfig | None = None,
    seed: int = 0,
    look: Callable[[], object] | None = None,
    begun: Sequence[str] | None = None,
    kind: type[Adapter] = Adapter,
) -> Adapter:
    """Attach a new adapter to `base` and freeze the rest.

    base       a Base, or a network of one's own
    config     the method's settings; None for a prompt alone
    targets    a Targeting, or what its field `targets` takes; None: those of `config`, else all linear layers
    prompt     settings of virtual tokens in front of the text
    look       runs the network on some training rows; called once, for an init that looks at the layers' inputs (EVA)
    kind       the class of the result
    begun      the modules of an adapter that has looked already, with `config` as it was settled then: it goes on from
               tensors that are put in its place afterwards
    Raises TargetError or ConfigError, before anything is changed, if the targets do not fit the model or the method, or
    if a pattern of the settings fits no target; ModelError for a model that takes no virtual tokens.
    """
    base = as_base(base)
    parts: list[Part] = []
    if config is not None:
        chosen = targets or config.targets or ALL_LINEAR
        targeting = chosen if isinstance(chosen, Targeting) else Targeting(targets=_as_endings(chosen))
        parts.append(_new_deltas(base, config, targeting, seed, look, begun))
    if prompt is not None:
        parts.append(new_virtual_tokens(base, prompt, seed))
    return kind(base, parts).attach()


def _as_endings(targets: str | Sequence[str]) -> str | tuple[str, ...]:
    return targets if isinstance(targets, str) else tuple(targets)


def as_base(base: Base | nn.Module) -> Base:
    """A network of one's own as a base; which of its parameters are trained stays as it is."""
    if isinstance(base, Base):
        return base
    first = next(base.parameters(), None)
    return Base(base) if first is None else Base(base, device=Device(first.device))


def _new_deltas(
    base: Base,
    config: MethodConfig,
    targeting: Targeting,
    seed: int,
    look: Callable[[], object] | None,
    begun: Sequence[str] | None,
) -> DeltaPart:
    network, method = base.network, METHODS[config.method]
    paths = fitting_paths(network, config, targeting)
    config, starts = _looked(network, config, paths, look) if begun is None else (config, {})
    chosen = begun if begun is not None else starts
    paths = [path for path in paths if path in chosen] if chosen else paths
    rng = torch.Generator().manual_seed(seed)
    deltas = {path: method(layer_at(network, path), config.at(path), rng) for path in paths}
    for path, watch in starts.items():
        watch.begin_(deltas[path])
    return DeltaPart(base, config, targeting, deltas)


def fitting_paths(model: nn.Module, config: MethodConfig, targeting: Targeting) -> list[str]:
    """Paths of the modules that get a delta, in the model's order; no weight is read.

    Raises TargetError or ConfigError, with all that is wrong, where targets, patterns and layers do not fit.
    """
    method = METHODS[config.method]
    paths = choose(model, targeting, method.kinds, config.method)
    refuse_idle_patterns(config, paths)
    problems = []
    for path in paths:
        try:
            method.refuse_layer(layer_at(model, path), config.at(path))
        except ConfigError as error:
            problems.append(f"  {path}: {error}")
    if problems:
        listed = "\n".join([*problems[:8], *([f"  ... and {len(problems) - 8} more"] if len(problems) > 8 else [])])
        raise ConfigError(f"{config.method} does not fit {len(problems)} of its {len(paths)} targets:\n{listed}")
    return paths


def _looked(
    model: nn.Module, config: MethodConfig, paths: list[str], look: Callable[[], object] | None
) -> tuple[MethodConfig, Mapping[str, Watch]]:
    """The settings, and each delta's start by path, after an init that starts from data saw the layers' inputs."""
    init = config.data_init
    if init is None:
        return config, {}
    if look is None:
        raise ConfigError(
            f"{config.method} starts from its layers' inputs: give `look`, a function that runs the model on some "
            "training rows"
        )
    watches = {path: init.watch(config.at(path)) for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(_seen(watch), with_kwargs=True)
        for path, watch in watches.items()
    ]
    try:
        with torch.no_grad():
            look()
    finally:
        for hook in hooks:
            hook.remove()
    settled: tuple[MethodConfig, Mapping[str, Watch]] = init.settle(config, watches)
    return settled


def _seen(watch: Watch) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
    def see(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        watch.see(inputs[0] if inputs else next(iter(named.values())))

    return see


def load_adapter(
    base: Base | nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    allow_other_base: bool = False,
    allow_no_effect: bool = False,
    kind: type[Adapter] = Adapter,
) -> Adapter:
    """Read an adapter folder (ours or PEFT's) and attach it, dropout off.

    name    keep it in `base.adapters` under this name, detached, for `base.using(name)`
    Raises AdapterMismatch, with the network unchanged, unless every tensor lands, every target is filled, shapes are
    equal, the base's fingerprint is the recorded one (or `allow_other_base`), and the adapter changes an output (or
    `allow_no_effect`).
    """
    base, folder = as_base(base), Path(folder)
    folders = parts_of(folder)
    parts, base_name = [], ""
    for one in folders or [folder]:
        files = read_adapter(one)
        base_name = base_name or str(files.config.get("base_model_name_or_path") or "")
        parts.append(
            read_part(base, files, str(one), allow_other_base=allow_other_base, allow_no_effect=allow_no_effect)
        )
    if folders and [part.folder for part in parts] != ["method", "prompt"]:
        raise AdapterMismatch(f"{folder} should hold a method's deltas and a prompt, and does not")
    adapter = kind(base, parts, base_name, folder.name if name is None else name).eval()
    adapter.facts = read_facts(folder)
    if name is None:
        return adapter.attach()
    base.adapters[name] = adapter
    return adapter
