"""Attach a new adapter to a base, or one from a folder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.added_tokens import Chosen, Tokens, add_and_choose, read_added_tokens
from veneer.adapters.deltas import DeltaPart
from veneer.adapters.layer_view import layer_at
from veneer.adapters.part import Part
from veneer.adapters.serialization import read_parts
from veneer.adapters.targets import ALL_LINEAR, Targeting, choose
from veneer.adapters.trained_modules import chosen_modules, is_inside, new_trained_modules
from veneer.adapters.trained_tokens import new_trained_tokens
from veneer.adapters.virtual_tokens import new_virtual_tokens
from veneer.base.base import Base
from veneer.base.device import Device
from veneer.disk.adapter_dir import parts_of, read_adapter, read_facts
from veneer.errors import AdapterMismatch, ConfigError, listed
from veneer.methods.base import METHODS, MethodConfig, Watch, refuse_idle_patterns
from veneer.prompts.base import PromptConfig


def attach(
    base: Base | nn.Module,
    config: MethodConfig | None,
    targets: Targeting | str | tuple[str, ...] | None = None,
    *,
    prompt: PromptConfig | None = None,
    trained_modules: Sequence[str] = (),
    new_tokens: Sequence[str] = (),
    trained_tokens: Tokens | Mapping[str, Tokens] = (),
    seed: int = 0,
    look: Callable[[], object] | None = None,
    begun: Sequence[str] | None = None,
    kind: type[Adapter] = Adapter,
) -> Adapter:
    """Attach a new adapter to `base` and freeze the rest.

    base               a Base, or a network of one's own
    config             the method's settings; None for a prompt alone
    targets            a Targeting, or what its field `targets` takes; None: those of `config`, else all linear layers
    prompt             settings of virtual tokens in front of the text
    trained_modules    path endings of modules that are trained in full; they get no delta
    new_tokens         added to the base's tokenizer and vocabulary; their rows are trained
    trained_tokens     tokens, as text or ids, whose rows are trained; by module name, if not in the embedding alone
    look               runs the network on some training rows; called once, for an init that looks at the layers' inputs
    kind               the class of the result
    begun              the modules of an adapter that has looked already, with `config` as it was settled then: it goes
                       on from tensors that are put in its place afterwards
    Raises TargetError or ConfigError, before anything is changed, if the targets do not fit the model or the method, or
    if a pattern of the settings fits no target; ModelError for a model that takes no virtual tokens.
    """
    base = as_base(base)
    parts: list[Part] = []
    whole = chosen_modules(base, trained_modules) if trained_modules else []
    if config is not None:
        given = targets if targets is not None else config.targets or ALL_LINEAR
        targeting = given if isinstance(given, Targeting) else Targeting(targets=_as_endings(given))
        paths = [p for p in fitting_paths(base.network, config, targeting) if not is_inside(p, whole)]
    rows = new_tokens or trained_tokens
    if rows and config is not None:
        _refuse_rows_of_targets(base, paths)
    chosen = add_and_choose(base, new_tokens, trained_tokens, whole) if rows else Chosen({}, [])
    if config is not None:
        parts.append(_new_deltas(base, config, targeting, paths, seed, look, begun))
    if whole:
        parts.append(new_trained_modules(base, whole))
    if chosen.ids:
        parts.append(new_trained_tokens(base, chosen.ids, chosen.fresh))
    if prompt is not None:
        parts.append(new_virtual_tokens(base, prompt, seed))
    adapter = kind(base, parts)
    adapter.new_tokens = tuple(new_tokens)
    return adapter.attach()


def _as_endings(targets: str | Sequence[str]) -> str | tuple[str, ...]:
    return targets if isinstance(targets, str) else tuple(targets)


def _refuse_rows_of_targets(base: Base, paths: Sequence[str]) -> None:
    if both := [path for path in (base.embedding_path, base.head_path) if path in paths]:
        raise ConfigError(f"rows of {both[0]} are trained, and it is a target too; leave it out of the targets")


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
    paths: list[str],
    seed: int,
    look: Callable[[], object] | None,
    begun: Sequence[str] | None,
) -> DeltaPart:
    network, method = base.network, METHODS[config.method]
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
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(
            f"{config.method} does not fit {len(problems)} of its {len(paths)} targets:\n{listed(problems)}"
        )
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
    parts: list[Part] = []
    base_name, facts = "", read_facts(folder)
    for one in folders or [folder]:
        files = read_adapter(one)
        base_name = base_name or str(files.config.get("base_model_name_or_path") or "")
        parts += read_parts(base, files, str(one), allow_other_base=allow_other_base, allow_no_effect=allow_no_effect)
    if folders and list(dict.fromkeys(part.folder for part in parts)) != ["method", "prompt"]:
        raise AdapterMismatch(f"{folder} should hold a method's deltas and a prompt, and does not")
    recorded = facts.get("new_tokens")
    new_tokens = list(map(str, recorded)) if isinstance(recorded, list) else []
    if (added := read_added_tokens(base, (folders or [folder])[0], parts)) is not None:
        added.give_(base)
        new_tokens = new_tokens or [str(token) for token in added.tokens]
    adapter = kind(base, parts, base_name, folder.name if name is None else name).eval()
    adapter.facts, adapter.new_tokens = facts, tuple(new_tokens)
    if name is None:
        return adapter.attach()
    base.adapters[name] = adapter
    return adapter
