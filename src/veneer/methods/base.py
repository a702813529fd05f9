"""What a method is: a delta on one frozen layer, its settings, and the registry of all of them.

A delta owns its whole life: birth (`__init__`), forward, end (`fold`), and its names on disk (`tensors`, `load_`,
`to_peft`, `from_peft`). So commands know no methods, and a new method is one new file.
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
"""What a parameter is to its delta; learning rates, restarts and rank policies read this, never names."""

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
    """What a delta may know of the layer it changes.

    The weight is always seen as (O, D), (O, D / groups, *kernel) for a convolution: an embedding of V words and a
    GPT-2 Conv1D keep their transpose, and whoever builds this turns it.
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
    """What the embedding multiplies its rows by (Gemma)."""
    padding_idx: int | None = None
    bias: Callable[[], Tensor] | None = field(default=None, repr=False)
    """The frozen bias (O,), float32, where the layer has one."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of one method; subclasses add typed fields with unit and range below each.

    A field whose name ends in `_pattern` maps module names to other values; every key has to fit a target.
    """

    method: ClassVar[str]

    def at(self, path: str) -> Self:
        """These settings as they hold for the module at `path`."""
        return self


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
    """Sees a layer's inputs before its delta begins, for methods that start from data."""

    @abstractmethod
    def see(self, x: Tensor) -> None:
        """Take in x (..., D), the layer's input in one forward pass."""


class Delta(nn.Module, ABC):
    """A trained change of one frozen layer: `y' = delta(x, y)` where y is the layer's own output."""

    Config: ClassVar[type[MethodConfig]]
    roles: ClassVar[Mapping[str, Role]]
    """Every parameter's role; nobody parses names."""
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    """The layers it can change."""
    past: dict[str, Tensor]
    """What the cycles that restarts have ended left, float32, no longer trained; empty before the first restart."""
    past_in_weight: bool = False
    """Whether the layer's own weight holds the past for now, so that `forward` leaves it out."""

    @abstractmethod
    def __init__(self, layer: FrozenLayer, config: Any, rng: torch.Generator) -> None:
        """Build the delta for `layer` with random numbers from `rng` (CPU); parameters are float32.

        Raises ConfigError as `refuse_layer` does.
        """
        super().__init__()
        self.refuse_layer(layer, config)
        self.past = {}

    @classmethod
    def refuse_layer(cls, layer: FrozenLayer, config: Any) -> None:
        """Raise ConfigError by name for a layer of its kinds that it cannot change; the layer's weight is not read."""

    @classmethod
    def watch(cls, config: Any) -> Watch | None:
        """What has to see a layer's inputs before deltas are made; None for methods that start from no data."""
        return None

    @classmethod
    def looks(cls, config: Any) -> int:
        """How many tokens of the training rows a `watch` has to see."""
        return 0

    @classmethod
    def settle(cls, config: Any, seen: Mapping[str, Watch]) -> tuple[Any, Mapping[str, Watch]]:
        """Settings that follow from what was seen, by module path, and the paths that get a delta with its start."""
        return config, seen

    def begin_(self, start: Watch) -> None:
        """Start from what was seen; called once, before training, by methods that have a `watch`."""

    def before(self, x: Tensor) -> Tensor:
        """The input the layer shall see in place of x; the layer's y and `forward` are then given this one."""
        return x

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, the layer's input, and y, its output (..., O) -> the changed output, in y's dtype."""

    def fold(self, w: Tensor) -> Tensor:
        """W (O, D, *kernel) float32, as the base has it -> the one weight that does the same alone, past and all.

        Raises NotFoldable by name.
        """
        raise NotFoldable(f"{type(self).__name__} is not a change of one weight, so it cannot be folded into it")

    def fold_bias(self, bias: Tensor) -> Tensor:
        """The layer's bias (O,) float32 -> the one that belongs to the folded weight; most methods leave it alone."""
        return bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (R, D) and B (O, R), float32, with B A the whole update of a linear layer's weight; None if it has none."""
        return None

    def now(self, config: Any) -> Any:
        """The adapter's own settings as they hold now: a restart may have moved one on (ReMoRA's grouping)."""
        return config

    @classmethod
    def refuse_restarts(cls, config: Any) -> None:
        """Raise ConfigError by name where restarts cannot widen the change; methods that have a past say nothing."""
        raise ConfigError(
            f"{config.method} gains nothing from restarts: cycles of it add up to what one of them can be; "
            "use lora, dora, pissa or eva, or mora with variant sharing, or leave restarts out"
        )

    def remember_(self) -> None:
        """End a cycle: the trained change joins the past; `restart_` follows, once the layer's weight is in place."""
        raise NotFoldable(f"{type(self).__name__} keeps no finished cycles, so it cannot be restarted in training")

    def fold_past(self, w: Tensor) -> Tensor:
        """W (O, D, *kernel) float32, as the base has it -> with the finished cycles alone."""
        return w

    def restart_(self, rng: torch.Generator) -> None:
        """Re-initialize in place after a fold, so that the delta is again no change (ReLoRA, ReMoRA)."""
        raise NotFoldable(f"{type(self).__name__} cannot be restarted: it has no re-initialization after a fold")

    @classmethod
    def penalty(cls, deltas: Sequence[Any], config: Any) -> Tensor | None:
        """What all deltas of one adapter together add to the loss of every step; None for nothing."""
        return None

    @classmethod
    def stepped_(cls, deltas: Sequence[Any], config: Any, step: int, steps: int) -> None:
        """Called after optimizer step `step` of `steps`, gradients still there, for methods with an own schedule.

        What such a method remembers stands in buffers of its deltas, so that a checkpoint holds it.
        """

    @classmethod
    @abstractmethod
    def n_params(cls, layer: FrozenLayer, config: Any) -> int:
        """Trainable parameters on `layer`, in closed form."""

    @classmethod
    def n_past(cls, layer: FrozenLayer, config: Any, cycles: int) -> int:
        """Numbers that so many finished cycles leave on `layer`, in closed form."""
        return 0

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is saved: key suffix after the module's path, as PEFT names it -> tensor."""

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise AdapterMismatch listing every saved key or shape that differs from this delta's own, and every tensor
        that holds no finite numbers.
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
        """Take saved tensors in place; raises as `check` does, before anything is changed."""
        self.check(tensors)
        for key, tensor in self.tensors().items():
            tensor.copy_(tensors[key])

    @classmethod
    @abstractmethod
    def to_peft(cls, config: Any) -> dict[str, Any]:
        """The method's own fields of adapter_config.json, `peft_type` among them."""

    @classmethod
    @abstractmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> MethodConfig | None:
        """Settings from an adapter_config.json; None if that file describes another method."""


METHODS: Registry[type[Delta]] = Registry("method")


def config_from(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """Typed settings of `method`; raises ConfigError for a field it does not have, with close matches."""
    return typed("method", method, METHODS[method].Config, settings)
