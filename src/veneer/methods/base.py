"""The base class of methods: a delta on one frozen layer, its settings, and the registry of all methods.

A delta owns its whole life: `__init__`, `forward`, `fold`, and its names on disk (`tensors`, `load_`, `to_peft`,
`from_peft`). So commands know no methods, and a new method is one new file.  A method that can be restarted during
training (ReLoRA, ReMoRA) derives from `Restartable` (restartable.py).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from veneer.errors import AdapterMismatch, ConfigError, NotFoldable, did_you_mean
from veneer.registry import Registry
from veneer.settings import typed

V = TypeVar("V")

Role = Literal["in", "out", "square", "scale", "bias", "full"]
"""The part a parameter has in its delta; learning rates, restarts and rank policies read this, never names."""

Kind = Literal["linear", "conv", "embedding", "norm", "module"]
"""A norm has a bias and no D; a module is a whole block with one input and one output of vectors."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; every tuple has one entry per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str


@dataclass(frozen=True)
class FrozenLayer:
    """A delta's view of the layer it changes.

    The weight is always (O, D), or (O, D / groups, *kernel) for a convolution.  An embedding of V words and a GPT-2
    Conv1D store the transpose; the caller that builds this view transposes it.
    """

    kind: Kind
    in_features: int
    """D: inputs; words V for an embedding; input channels for a convolution."""
    out_features: int
    """O: outputs; width of an embedding; output channels for a convolution."""
    weight: Callable[[], Tensor] = field(repr=False)
    """The frozen weight, dense, float32."""
    has_bias: bool = False
    geometry: Geometry | None = None
    """Only for convolutions."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    embed_scale: float = 1.0
    """Factor on the embedding's rows (Gemma)."""
    padding_idx: int | None = None
    bias: Callable[[], Tensor] | None = field(default=None, repr=False)
    """The frozen bias (O,), float32, where the layer has one."""


PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rank_stabilized",
    "init_lora_weights": "init",
    "target_modules": "targets",
}
"""PEFT's spelling of a setting -> ours."""


class _Spelled(type):
    """Accepts PEFT's names where a config is made: LoRAConfig(r=16, lora_alpha=32, target_modules=["q_proj"])."""

    def __call__(cls, **settings: Any) -> Any:
        for theirs in PEFT_NAMES.keys() & settings.keys():
            ours = PEFT_NAMES[theirs]
            if ours in settings:
                raise ConfigError(f"{cls.__name__} is given {ours} and {theirs}, which are one setting")
            settings[ours] = settings.pop(theirs)
        return super().__call__(**settings)


@dataclass(frozen=True, kw_only=True)
class MethodConfig(metaclass=_Spelled):
    """Settings of one method; subclasses add typed fields with unit and range below each.

    A field whose name ends in `_pattern` maps module names to other values; every key has to fit a target.
    """

    method: ClassVar[str]
    targets: str | tuple[str, ...] | None = None
    """Modules to change: "all-linear", a regular expression, or path endings; None leaves it to `attach`."""

    def at(self, path: str) -> Self:
        """The settings for the module at `path`, with its patterns applied."""
        return self

    @property
    def data_init(self) -> "DataInit | None":
        """The init that looks at the layers' inputs before training; None if the method starts without data."""
        return None


@dataclass(frozen=True, kw_only=True)
class RankedConfig(MethodConfig):
    """Settings of methods with a rank and a scale that may differ by layer."""

    rank: int = 8
    """R, at least 1."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank (no unit)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for modules whose path ends with, or matches, a key; the first that fits counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas, likewise."""

    def __post_init__(self) -> None:
        for where, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if rank < 1:
                raise ConfigError(f"{self.method}: {where} must be at least 1, got {rank}")
        alphas = [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())]
        for where, alpha in alphas:
            if not isfinite(alpha) or alpha == 0:
                raise ConfigError(f"{self.method}: {where} must be a finite number other than 0, got {alpha}")

    def at(self, path: str) -> Self:
        rank = first_match(self.rank_pattern, path, self.rank)
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        return replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})


def first_match(pattern: Mapping[str, V], path: str, default: V) -> V:
    """The value of the first key that matches the end of `path` at a dot, as PEFT reads its patterns."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        except re.error as error:
            raise ConfigError(f"{key!r} in a pattern is not a regular expression: {error}") from error
    return default


def refuse_idle_patterns(config: MethodConfig, paths: Sequence[str]) -> None:
    """Raise ConfigError listing every key of a `..._pattern` field that fits none of the target modules."""
    endings = sorted({p.rpartition(".")[2] for p in paths})
    idle = [
        f"{f.name}[{key!r}] fits no target{did_you_mean(key, [*endings, *paths])}"
        for f in fields(config)
        if f.name.endswith("_pattern")
        for key in getattr(config, f.name)
        if not any(first_match({key: True}, path, False) for path in paths)
    ]
    if idle:
        raise ConfigError(f"{config.method}: " + "\n".join(idle))


class Watch(ABC):
    """Sees one layer's inputs before training, and sets where its delta starts."""

    @abstractmethod
    def see(self, x: Tensor) -> None:
        """Take in x (..., D), the layer's input in one forward pass."""

    @abstractmethod
    def begin_(self, delta: Any) -> None:
        """Set the delta's parameters from the inputs seen; called once, before training."""


class DataInit(ABC):
    """An init that starts from data: one `Watch` per layer sees the inputs of some training rows."""

    look: int
    """Tokens of the training rows to look at."""

    @abstractmethod
    def watch(self, config: Any) -> Watch:
        """A new watch for one layer, whose own settings are `config`."""

    @abstractmethod
    def settle(self, config: Any, seen: Mapping[str, Watch]) -> tuple[Any, Mapping[str, Watch]]:
        """The settings that follow from the inputs seen, by module path, and the watches of the layers that get a
        delta.
        """


class Delta(nn.Module, ABC):
    """A trained change of one frozen layer: `y' = delta(x, y)` where y is the layer's own output."""

    Config: ClassVar[type[MethodConfig]]
    roles: ClassVar[Mapping[str, Role]]
    """Every parameter's role; nobody parses names."""
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    """The layers it can change."""

    @abstractmethod
    def __init__(self, layer: FrozenLayer, config: Any, rng: torch.Generator) -> None:
        """Build the delta for `layer` with random numbers from `rng` (CPU); parameters are float32.

        Raises ConfigError as `refuse_layer` does.
        """
        super().__init__()
        self.refuse_layer(layer, config)

    @classmethod
    def refuse_layer(cls, layer: FrozenLayer, config: Any) -> None:
        """Raise ConfigError by name for a layer of its kinds that it cannot change; the layer's weight is not read."""

    def before(self, x: Tensor) -> Tensor:
        """The input that the layer sees in place of x; `forward` then gets this one too."""
        return x

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, the layer's input, and y, its output (..., O) -> the changed output, in y's dtype."""

    def fold(self, w: Tensor) -> Tensor:
        """W (O, D, *kernel) float32, the base's own -> the single weight that does the same without the delta.

        Raises NotFoldable by name.
        """
        raise NotFoldable(f"{type(self).__name__} is not a change of one weight, so it cannot be folded into it")

    def fold_bias(self, bias: Tensor) -> Tensor:
        """The layer's bias (O,) float32 -> the folded weight's bias; most methods do not change it."""
        return bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (R, D) and B (O, R), float32, with B A the whole update of a linear layer's weight; None if it has none."""
        return None

    @classmethod
    def penalty(cls, deltas: Sequence[Any], config: Any) -> Tensor | None:
        """Term that all deltas of one adapter together add to each step's loss; None for nothing."""
        return None

    @classmethod
    def stepped_(cls, deltas: Sequence[Any], config: Any, step: int, steps: int) -> None:
        """Hook after optimizer step `step` of `steps`, before gradients are cleared, for methods with a schedule.

        Such a method keeps its state in buffers of its deltas, so that checkpoints contain it.
        """

    @classmethod
    @abstractmethod
    def n_params(cls, layer: FrozenLayer, config: Any) -> int:
        """Trainable parameters on `layer`, in closed form."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save: PEFT's key after the module's path -> tensor."""

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise AdapterMismatch listing every saved key or shape that differs from this delta's own, and every tensor
        with numbers that are not finite.
        """
        mine = self.tensors()
        problems = [f"{k}: in the adapter, not in the model" for k in tensors if k not in mine]
        for key, want in mine.items():
            if key not in tensors:
                problems.append(f"{key}: in the model, not in the adapter")
            elif tensors[key].shape != want.shape:
                problems.append(f"{key}: adapter has {tuple(tensors[key].shape)}, model needs {tuple(want.shape)}")
            elif not tensors[key].is_floating_point():
                problems.append(f"{key}: adapter has {tensors[key].dtype}, a floating-point type is needed")
            elif not bool(tensors[key].float().isfinite().all()):
                problems.append(f"{key}: holds numbers that are infinite or not a number")
        if problems:
            raise AdapterMismatch("\n".join(problems))

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Load saved tensors in place; raises as `check` does, before anything is changed."""
        self.check(tensors)
        for key, tensor in self.tensors().items():
            tensor.copy_(tensors[key])

    @classmethod
    def to_peft(cls, config: Any) -> dict[str, Any]:
        """The method's own fields of adapter_config.json, including `peft_type`.
        Here: for a method that PEFT does not have, a type that it refuses and our settings."""
        return {"peft_type": config.method.upper(), **{name: getattr(config, name) for name in cls._settings()}}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> MethodConfig | None:
        """Settings from an adapter_config.json; None if that file describes another method."""
        method = cls.Config.method
        if fields.get("peft_type") != method.upper():
            return None
        return typed("method", method, cls.Config, {name: fields[name] for name in cls._settings() if name in fields})

    @classmethod
    def _settings(cls) -> list[str]:
        return [f.name for f in fields(cls.Config) if f.name != "targets"]


METHODS: Registry[type[Delta]] = Registry("method")


def config_from(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """Typed settings of `method`; raises ConfigError for a field it does not have, with close matches."""
    return typed("method", method, METHODS[method].Config, settings)
