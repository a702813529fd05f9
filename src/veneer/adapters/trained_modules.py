"""Modules trained in full beside a method's deltas (PEFT's `modules_to_save`): embeddings, an output head, norms.

While such a module runs it has the trained weights, in its own number type; between calls it is as the base has it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.part import PREFIX, Fold, NamedParameter, Part
from veneer.adapters.targets import all_matching
from veneer.base.base import Base
from veneer.base.vocabulary import refuse_stored, share_weight
from veneer.disk.adapter_dir import AdapterFiles
from veneer.errors import TargetError, did_you_mean
from veneer.methods.base import Role
from veneer.storage.layers import Stored


class TrainedModule(nn.Module):
    """The whole weights of one module, float32; parameters that two modules share may be shared here too."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


class TrainedModules(Part):
    """Modules by path, each with all of its parameters trained."""

    def __init__(self, base: Base, names: Sequence[str], modules: Mapping[str, TrainedModule], tied: bool) -> None:
        super().__init__(base)
        self.names, self.tied = tuple(names), tied
        """`names`: the chosen modules' paths; those in `modules` hold parameters, and may lie inside them."""
        self._modules = dict(modules)

    @property
    def kind(self) -> str:
        return "trained modules"

    def attach(self) -> None:
        for path, trained in self._modules.items():
            module = self.base.network.get_submodule(path)
            before, after = _swap(trained)
            self._hooks.append(module.register_forward_pre_hook(before))
            self._hooks.append(module.register_forward_hook(after, prepend=True, always_call=True))

    @property
    def vocabulary(self) -> int:
        both = (self.base.embedding_path, self.base.head_path)
        return max((len(m.get_parameter("weight")) for path, m in self._modules.items() if path in both), default=0)

    def holders(self) -> Mapping[str, nn.Module]:
        return self._modules

    def named(self) -> list[NamedParameter]:
        found: dict[int, NamedParameter] = {}
        for path, trained in self._modules.items():
            place = "embedding" if isinstance(self.base.network.get_submodule(path), nn.Embedding) else "layer"
            for name, parameter in trained.named_parameters():
                role: Role = "full" if parameter.dim() > 1 else "bias" if name == "bias" else "scale"
                found.setdefault(id(parameter), NamedParameter(path, name, role, parameter, place))  # type: ignore[arg-type]
        return list(found.values())

    def tensors(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}": parameter for name, parameter in self._all()}

    def peft_fields(self) -> dict[str, Any]:
        names = [n for n in self.names if n != self.base.head_path] if self.tied else list(self.names)
        return {"modules_to_save": names, **({"ensure_weight_tying": True} if self.tied else {})}

    def folds(self) -> dict[str, Fold]:
        made: dict[int, Fold] = {}
        return {name: made.setdefault(id(p), _Whole(p)) for name, p in self._all()}

    def _all(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{path}.{n}", p) for path, m in self._modules.items() for n, p in m.named_parameters()]


class _Whole:
    """The fold of a weight that is trained in full."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter

    def __call__(self, weight: Tensor) -> Tensor:
        return self._parameter.detach()


def chosen_modules(base: Base, names: Sequence[str]) -> list[str]:
    """Paths of the modules that `names` (path endings) mean.

    Raises TargetError for a name that matches nothing, and ConfigError for a module that is quantized.
    """
    network = base.network
    every = [path for path, _ in network.named_modules() if path]
    endings = sorted({path.rpartition(".")[2] for path in every})
    problems = [
        f"  trained module {name!r} matches no module{did_you_mean(name, endings)}"
        for name in names
        if not all_matching(network, (name,))
    ]
    if problems:
        listed = "\n".join(problems)
        raise TargetError(
            f"trained modules do not fit this model:\n{listed}\nIts modules end in: {', '.join(endings)}."
        )
    paths = all_matching(network, tuple(names))
    refuse_stored(base, [network.get_submodule(path) for path in inner_paths(base, paths)])
    return paths


def inner_paths(base: Base, paths: Sequence[str]) -> list[str]:
    """Paths of all modules with parameters (or a stored weight) of their own, at or below `paths`."""
    every = base.network.named_modules()
    return [path for path, m in every if (m._parameters or isinstance(m, Stored)) and is_inside(path, paths)]


def is_inside(path: str, paths: Sequence[str]) -> bool:
    """Whether the module at `path` is one of these, or lies in one."""
    return any(path == p or path.startswith(f"{p}.") for p in paths)


def new_trained_modules(base: Base, paths: Sequence[str]) -> TrainedModules:
    """The base's own weights of the modules at `paths`, to be trained; those of a tied embedding and head stay tied."""
    made: dict[int, nn.Parameter] = {}

    def own(parameter: nn.Parameter) -> nn.Parameter:
        whole = parameter.detach().to(torch.float32, copy=True)
        return made.setdefault(id(parameter), nn.Parameter(whole))

    modules = {}
    for path in inner_paths(base, paths):
        parameters = base.network.get_submodule(path)._parameters
        modules[path] = TrainedModule({name: own(p) for name, p in parameters.items() if p is not None})
    both = {base.embedding_path, base.head_path} <= modules.keys()
    return TrainedModules(base, paths, modules, both and share_weight(base))


def read_trained_modules(base: Base, files: AdapterFiles) -> tuple[TrainedModules | None, set[str], list[str]]:
    """The modules that a folder brings whole, the keys of their tensors, and what is wrong with them.

    PEFT names modules by the end of their path, at no dot: `norm` means `input_layernorm` too.
    """
    names, tied = files.config.get("modules_to_save") or [], bool(files.config.get("ensure_weight_tying"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None, set(), [f"  modules_to_save should be a list of module names, but is {names!r}"]
    paths = [path for path, _ in base.network.named_modules() if any(path.endswith(name) for name in names)]
    if tied and base.embedding_path in paths and share_weight(base):
        paths.append(str(base.head_path))
    inner = inner_paths(base, paths)
    problems = [f"  {name}: to be trained in full, but not in the model" for name in names if not paths]
    modules: dict[str, TrainedModule] = {}
    shared: dict[int, nn.Parameter] = {}
    used = set()
    for path in inner:
        parameters = {}
        for name, own in base.network.get_submodule(path)._parameters.items():
            key = f"{PREFIX}{path}.{name}"
            if own is None:
                continue
            if key not in files.tensors:
                problems.append(f"  {key}: in the model, not in the adapter")
                continue
            used.add(key)
            tensor = files.tensors[key]
            rows_may_grow = path in (base.embedding_path, base.head_path) and len(tensor) > len(own)
            if tensor.shape[1:] != own.shape[1:] or (len(tensor) != len(own) and not rows_may_grow):
                problems.append(f"  {key}: adapter has {tuple(tensor.shape)}, model needs {tuple(own.shape)}")
                continue
            made = nn.Parameter(tensor.to(own.device, torch.float32, copy=True))
            parameters[name] = shared.setdefault(id(own), made) if tied else made
        modules[path] = TrainedModule(parameters)
    if not modules or problems:
        return None, used, problems
    refuse_stored(base, [base.network.get_submodule(path) for path in inner])
    return TrainedModules(base, paths, modules, tied), used, []


Before = Callable[[nn.Module, tuple[Any, ...]], None]
After = Callable[[nn.Module, tuple[Any, ...], Any], None]


def _swap(trained: TrainedModule) -> tuple[Before, After]:
    """Hooks that give the module the trained weights for the length of one call."""
    waiting: list[dict[str, nn.Parameter | None]] = []

    def before(module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        own = dict(module._parameters)
        waiting.append(own)
        for name, parameter in trained.named_parameters():
            like = own[name]
            module._parameters[name] = parameter if like is None else parameter.to(like.dtype)  # type: ignore[assignment]

    def after(module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        if waiting:
            module._parameters.update(waiting.pop())

    return before, after
