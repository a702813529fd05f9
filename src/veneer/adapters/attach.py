"""An adapter: all deltas of one training, hung on a model's modules by forward hooks.

The model's modules, names and state dict stay as they were; `detach` leaves it bit-identical.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.adapters.adapter import Change, Named
from veneer.adapters.composite import Together
from veneer.adapters.layer_view import frozen_layer
from veneer.adapters.serialization import read_into, to_files
from veneer.adapters.targets import Targeting, choose
from veneer.adapters.virtual_tokens import Prompted, config_of_prompt, load_prompt
from veneer.disk.adapter_dir import AdapterFiles, parts_of, read_adapter, write_adapter
from veneer.errors import AdapterMismatch, ConfigError
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig, Watch, refuse_idle_patterns


class Adapter(Change):
    """The deltas of one training, by module path, on one model.

    They hang on hooks and are no part of the model: `model.train()` and `.eval()` do not reach them, `train` and `eval`
    here do.
    """

    def __init__(
        self, model: nn.Module, config: MethodConfig, targeting: Targeting, deltas: Mapping[str, Delta], base: str = ""
    ) -> None:
        self.model, self.config, self.targeting, self.base = model, config, targeting, base
        self._deltas = dict(deltas)
        self._embeddings = {p for p in deltas if isinstance(model.get_submodule(p), nn.Embedding)}
        self._hooks: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []

    @property
    def kind(self) -> str:
        return self.config.method

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def attach(self) -> "Adapter":
        """Hang every delta on its module and freeze the base; does nothing if attached."""
        if not self.attached:
            self._frozen = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            for path, delta in self.deltas.items():
                module = self.model.get_submodule(path)
                if type(delta).before is not Delta.before:
                    self._hooks.append(module.register_forward_pre_hook(_before(delta), with_kwargs=True))
                self._hooks.append(module.register_forward_hook(_hook(delta), with_kwargs=True))
        return self

    def detach(self) -> "Adapter":
        """Take every delta off again and restore which parameters of the base are trained."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._hooks, self._frozen = [], []
        return self

    @property
    def deltas(self) -> Mapping[str, Delta]:
        return self._deltas

    @property
    def settings(self) -> MethodConfig:
        return self.config

    def holders(self) -> Mapping[str, nn.Module]:
        return self._deltas

    def named(self) -> list[Named]:
        return [
            Named(
                path,
                name,
                delta.roles[name.partition(".")[0]],
                parameter,
                "embedding" if path in self._embeddings else "layer",
            )
            for path, delta in self._deltas.items()
            for name, parameter in delta.named_parameters()
        ]

    def penalty(self) -> Tensor | None:
        return METHODS[self.config.method].penalty(list(self._deltas.values()), self.config)

    def stepped_(self, step: int, steps: int) -> None:
        METHODS[self.config.method].stepped_(list(self._deltas.values()), self.config, step, steps)

    def files(self, facts: Mapping[str, Any] | None = None) -> AdapterFiles:
        """The folder that `save` writes, as plain data."""
        return to_files(self, facts or {})

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> int:
        return write_adapter(Path(folder), self.files(facts))


def attach(
    model: nn.Module,
    config: MethodConfig,
    targets: Targeting | str | tuple[str, ...] = "all-linear",
    *,
    seed: int = 0,
    base: str = "",
    look: Callable[[], object] | None = None,
    begun: Sequence[str] | None = None,
) -> Adapter:
    """Hang new deltas of `config`'s method on `model` and freeze the rest.

    targets    a Targeting, or what its field `targets` takes
    base       the name by which others find the base model; written into the adapter's folder
    look       runs the model on some training rows; called once, for an init that looks at the layers' inputs (EVA)
    begun      the modules of an adapter that has looked already, with `config` as it was settled then: it goes on from
               tensors that are put in its place afterwards
    Raises TargetError or ConfigError before anything is changed if the targets do not fit the model or the method, or
    if a pattern of the settings fits no target.
    """
    targeting = targets if isinstance(targets, Targeting) else Targeting(targets=targets)
    method = METHODS[config.method]
    paths = fitting_paths(model, config, targeting)
    config, starts = _looked(model, config, paths, look) if begun is None else (config, {})
    chosen = begun if begun is not None else starts
    paths = [path for path in paths if path in chosen] if chosen else paths
    rng = torch.Generator().manual_seed(seed)
    deltas = {path: method(layer_at(model, path), config.at(path), rng) for path in paths}
    for path, watch in starts.items():
        watch.begin_(deltas[path])
    return Adapter(model, config, targeting, deltas, base).attach()


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
    model: nn.Module, folder: str | Path, *, allow_other_base: bool = False, allow_no_effect: bool = False
) -> Change:
    """Read an adapter folder (ours or PEFT's) and attach it: deltas (an Adapter), a prompt, or both.

    Raises AdapterMismatch, with the model unchanged, unless every tensor lands, every target is filled, shapes are
    equal, the base's fingerprint is the recorded one (or `allow_other_base`), and the adapter changes an output (or
    `allow_no_effect`).
    """
    folder = Path(folder)
    parts = parts_of(folder)
    if not parts:
        return _load_alone(model, folder, allow_other_base, allow_no_effect)
    loaded: list[Change] = []
    try:
        for part in parts:
            loaded.append(_load_alone(model, part, allow_other_base, allow_no_effect))
        if [type(part) for part in loaded] != [Adapter, Prompted]:
            raise AdapterMismatch(f"{folder} should hold a method's deltas and a prompt, and does not")
    except BaseException:
        for before in loaded:
            before.detach()
        raise
    return Together(*loaded)  # type: ignore[arg-type]


def _load_alone(model: nn.Module, folder: Path, allow_other_base: bool, allow_no_effect: bool) -> Change:
    files = read_adapter(folder)
    if config_of_prompt(files.config) is not None:
        return load_prompt(model, folder, allow_other_base=allow_other_base)
    loaded = read_into(model, files, str(folder), allow_other_base=allow_other_base, allow_no_effect=allow_no_effect)
    base = str(files.config.get("base_model_name_or_path") or "")
    return Adapter(model, loaded.config, loaded.targeting, loaded.deltas, base).eval().attach()


def layer_at(model: nn.Module, path: str) -> FrozenLayer:
    """The frozen layer at `path`, which targeting has found to be one."""
    layer = frozen_layer(model.get_submodule(path), blocks=True)
    assert layer is not None, f"{path} was chosen as a target but is no layer"
    return layer


def _hook(delta: Delta) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
    def change(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        changed: Tensor = delta(inputs[0] if inputs else next(iter(named.values())), output)
        return changed

    return change


Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def _before(delta: Delta) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], Inputs]:
    def change(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Inputs:
        if inputs:
            return (delta.before(inputs[0]), *inputs[1:]), named
        name = next(iter(named))
        return (), {**named, name: delta.before(named[name])}

    return change
