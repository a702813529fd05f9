"""LoRA: learn a rank-R update to a frozen weight.

    y' = y + s B A x        A: (R, D)    B: (O, R)    s = alpha / R, or alpha / sqrt(R) when rank-stabilized

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 and section 4.1; rank-stabilized scale: arXiv:2312.03732.
Departs from it: A ~ U(-1/sqrt(D), 1/sqrt(D)), as the authors' code does; the paper says Gaussian.

Embedding: y = E[token], so A x is a look-up in A: (R, V), which starts at 0, and B: (O, R) is drawn.
Convolution: A is a convolution of R channels that walks as the layer does, B a 1x1 one. With groups each group has its
own R / groups channels, which is what makes the update a change of the one grouped weight.

After n - 1 restarts (ReLoRA, arXiv:2307.05695) the change is the sum of n such products, which is one of rank n R: A's
rows below each other, B's columns side by side, the same s.  So it is saved, and only the last R are trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import AdapterMismatch, ConfigError, NotFoldable
from veneer.methods.base import METHODS, Delta, FrozenLayer, Geometry, Kind, RankedConfig, Role, config_from

Init = Literal["uniform", "gaussian", "random"]
_INIT_IN_PEFT: dict[Init, Any] = {"uniform": True, "gaussian": "gaussian", "random": False}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(RankedConfig):
    """Settings of LoRA."""

    method: ClassVar[str] = "lora"
    dropout: float = 0.0
    """Share of the delta's inputs set to 0 in training, in [0, 1)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    init: Init = "uniform"
    """How A starts: uniform or gaussian, both with B = 0; random draws B too, so the delta is not 0 at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.method}.dropout must be in [0, 1), got {self.dropout}")
        if self.init not in get_args(Init):
            raise ConfigError(f"{self.method}.init must be one of {', '.join(get_args(Init))}, got {self.init!r}")

    @property
    def scale(self) -> float:
        """s, what the update is multiplied by."""
        return self.alpha / (sqrt(self.rank) if self.rank_stabilized else self.rank)


@METHODS.add("lora")
class LoRA(Delta):
    """The LoRA delta of one layer: parameters a (R, D, *kernel) and b (O, R), or (O, R / groups) in a grouped layer."""

    Config = LoRAConfig
    roles: ClassVar[Mapping[str, Role]] = {"a": "in", "b": "out"}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})

    def __init__(self, layer: FrozenLayer, config: LoRAConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.kind, self.config, self.scale = layer.kind, config, config.scale
        self.geometry, self.padding_idx = layer.geometry, layer.padding_idx
        self.in_features, self.embed_scale = layer.in_features, layer.embed_scale
        a_shape, b_shape = _shapes(layer, config)
        self.a = nn.Parameter(torch.empty(a_shape))
        self.b = nn.Parameter(torch.empty(b_shape))
        self.dropout = nn.Dropout(config.dropout)
        self.restart_(rng)
        self.to(layer.device)

    @classmethod
    def refuse_layer(cls, layer: FrozenLayer, config: LoRAConfig) -> None:
        groups = 1 if layer.geometry is None else layer.geometry.groups
        if config.rank % groups:
            raise ConfigError(
                f"lora.rank {config.rank} does not divide by the {groups} groups of a convolution with "
                f"{layer.in_features} inputs; use a multiple of {groups} for it (rank_pattern), or exclude it"
            )

    @torch.no_grad()
    def restart_(self, rng: torch.Generator) -> None:
        init = self.config.init
        drawn, other = (self.b, self.a) if self.kind == "embedding" else (self.a, self.b)
        if self.kind == "embedding":
            drawn.copy_(torch.empty(drawn.shape).normal_(generator=rng))
        elif init == "gaussian":
            drawn.copy_(torch.empty(drawn.shape).normal_(0.0, 1 / self.config.rank, generator=rng))
        else:
            drawn.copy_(_uniform(drawn.shape, prod(drawn.shape[1:]), rng))
        other.copy_(_uniform(other.shape, self.config.rank, rng) if init == "random" else torch.zeros(other.shape))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Linear: x (..., D), y (..., O).  Convolution: x (B, D, *space).  Embedding: x (...) token ids."""
        if self.past and not self.past_in_weight:
            y = self._added(x, y, self.past["a"], self.past["b"])
        return self._added(x if self.kind == "embedding" else self.dropout(x.to(y.dtype)), y, self.a, self.b)

    def _added(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """y + s B A x."""
        if self.kind == "embedding":
            h = F.embedding(x, a.T, self.padding_idx).to(y.dtype)
            return _add_product(y, h, b, self.scale * self.embed_scale)
        x = x.to(y.dtype)
        if self.kind == "conv":
            return y + self._convolved(x, a, b) * self.scale
        return _add_product(y, F.linear(x, a.to(x.dtype)), b, self.scale)

    def _convolved(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        g = _geometry(self.geometry)
        conv = _CONV[len(g.kernel)]
        padding = g.padding
        if g.padding_mode != "zeros":
            x, padding = F.pad(x, _pad_widths(g), mode=g.padding_mode), (0,) * len(g.kernel)
        a_groups = self.in_features // a.shape[1]
        h = conv(x, a.to(x.dtype), None, g.stride, padding, g.dilation, a_groups)
        out: Tensor = conv(h, b.to(x.dtype).reshape(*b.shape, *([1] * len(g.kernel))), None, 1, 0, 1, g.groups)
        return out

    @classmethod
    def refuse_restarts(cls, config: LoRAConfig) -> None:
        if config.init == "random":
            raise ConfigError(
                f"{config.method}.init random does not begin at no change, so each restart would throw the model off; "
                "use uniform or gaussian with restarts"
            )

    def _change(self) -> tuple[Tensor, Tensor]:
        """A and B of the change that is trained now, as they join the past."""
        return self.a, self.b

    def _whole(self) -> tuple[Tensor, Tensor]:
        """A and B of the past and the present change together."""
        a, b = self._change()
        if not self.past:
            return a, b
        groups = self.geometry.groups if self.geometry is not None else 1  # each group's rows stay together
        rows = [t.reshape(groups, -1, *t.shape[1:]) for t in (self.past["a"], a)]
        return torch.cat(rows, dim=1).flatten(0, 1), torch.cat([self.past["b"], b], dim=1)

    @torch.no_grad()
    def remember_(self) -> None:
        a, b = self._whole()
        self.past = {"a": a.detach().clone(), "b": b.detach().clone()}

    def fold_past(self, w: Tensor) -> Tensor:
        return self._folded(w, self.past["a"], self.past["b"]) if self.past else w

    def fold(self, w: Tensor) -> Tensor:
        return self._folded(w, *self._whole())

    def now(self, config: LoRAConfig) -> LoRAConfig:
        """Of one LoRA that is all cycles together: n times the rank, the same scale."""
        n = len(self._whole()[0]) // len(self._change()[0])
        more = sqrt(n) if config.rank_stabilized else float(n)
        return replace(
            config,
            rank=n * config.rank,
            alpha=more * config.alpha,
            rank_pattern={k: n * rank for k, rank in config.rank_pattern.items()},
            alpha_pattern={k: more * alpha for k, alpha in config.alpha_pattern.items()},
        )

    def _folded(self, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """W + s B A."""
        if self.kind != "conv":
            return w + (b.to(w.dtype) @ a.to(w.dtype)) * self.scale
        groups = _geometry(self.geometry).groups
        if a.shape[1] != self.in_features // groups:
            raise NotFoldable(
                "this lora delta on a grouped convolution mixes channels across groups (as PEFT trains it), "
                "which no grouped weight can do; keep it as an adapter"
            )
        a = a.to(w.dtype).reshape(groups, a.shape[0] // groups, -1)
        b = b.to(w.dtype).reshape(groups, b.shape[0] // groups, -1)
        return w + torch.bmm(b, a).reshape(w.shape) * self.scale

    def factors(self) -> tuple[Tensor, Tensor] | None:
        a, b = self._whole()
        return (a.detach(), b.detach() * self.scale) if self.kind == "linear" else None

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: LoRAConfig) -> int:
        """R (D + O); with a kernel of K points and g groups R (D K + O) / g."""
        points, groups = (prod(layer.geometry.kernel), layer.geometry.groups) if layer.geometry else (1, 1)
        return config.rank * (layer.in_features * points + layer.out_features) // groups

    @classmethod
    def n_past(cls, layer: FrozenLayer, config: LoRAConfig, cycles: int) -> int:
        """A and B of each cycle."""
        return cycles * LoRA.n_params(layer, config)

    def tensors(self) -> dict[str, Tensor]:
        a, b = self._whole()
        if self.kind == "embedding":
            return {"lora_embedding_A": a, "lora_embedding_B": b}
        if self.kind == "linear":
            return {"lora_A.weight": a, "lora_B.weight": b}
        b = b.reshape(*b.shape, *([1] * (a.dim() - 2)))
        return {"lora_A.weight": self._across_groups(a), "lora_B.weight": b}

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        if self.kind != "conv":
            super().load_(tensors)
            return
        self.check(tensors)
        a, own = tensors["lora_A.weight"], _own_group(tensors["lora_A.weight"], _geometry(self.geometry).groups)
        kept = a if own is None else own
        if kept.shape == self.a.shape:
            self.a.copy_(kept)
        else:  # PEFT's rows may reach beyond their own group; then A keeps all channels
            self.a = nn.Parameter(kept.to(self.a.device, self.a.dtype, copy=True))
        self.b.copy_(tensors["lora_B.weight"].reshape(self.b.shape))

    def _across_groups(self, a: Tensor) -> Tensor:
        """A as PEFT stores it: every channel of every group, zero outside a row's own group."""
        groups = _geometry(self.geometry).groups
        if a.shape[1] == self.in_features:
            return a
        rows, width = a.shape[0] // groups, a.shape[1]
        full = a.new_zeros(a.shape[0], self.in_features, *a.shape[2:])
        for g in range(groups):
            full[g * rows : (g + 1) * rows, g * width : (g + 1) * width] = a[g * rows : (g + 1) * rows]
        return full

    @classmethod
    def to_peft(cls, config: LoRAConfig) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.rank_stabilized,
            "init_lora_weights": _INIT_IN_PEFT[config.init],
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": dict(config.alpha_pattern),
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> LoRAConfig | None:
        if fields.get("peft_type") != "LORA" or any(fields.get(k) for k in ("use_dora", "use_mora")):
            return None
        _refuse_unread(fields)
        named: dict[Any, Init] = {v: k for k, v in _INIT_IN_PEFT.items()}
        settings = {
            "rank": fields.get("r", 8),
            "alpha": fields.get("lora_alpha", 8),
            "dropout": fields.get("lora_dropout", 0.0),
            "rank_stabilized": fields.get("use_rslora", False),
            "init": named.get(fields.get("init_lora_weights", True), "uniform"),  # how it began does not matter now
            "rank_pattern": fields.get("rank_pattern") or {},
            "alpha_pattern": fields.get("alpha_pattern") or {},
        }
        config = config_from(cls.Config.method, settings)
        assert isinstance(config, LoRAConfig)
        return config


_NOT_READ = (
    "bias",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
)
"""Fields of PEFT's LoRA that change what the adapter means; those named `use_...` are refused besides."""
_SAME_BASE = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}
"""PEFT's initializations that leave the base weights alone; the others train against a changed base."""


def _refuse_unread(fields: Mapping[str, Any]) -> None:
    """Raise AdapterMismatch for an adapter_config.json that asks for more than LoRA as it is here."""
    variants = [k for k, v in fields.items() if k.startswith("use_") and v and k != "use_rslora"]
    unread = variants + [k for k in _NOT_READ if fields.get(k) and fields[k] != "none"]
    if unread:
        raise AdapterMismatch(f"this LoRA adapter uses {', '.join(unread)}, which veneer does not read")
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in _SAME_BASE:
        raise AdapterMismatch(
            f"this LoRA adapter began with init_lora_weights {init!r}, which changes the base weights too, so it does "
            "not fit the base as it is; convert it in peft (path_initial_model_for_weight_conversion) or merge it there"
        )


_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _uniform(shape: tuple[int, ...], fan_in: int, rng: torch.Generator) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is Kaiming's with a = sqrt(5)."""
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=rng)


def _add_product(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """y (..., O) + scale h (..., R) B^T, in one matrix product."""
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), b.to(y.dtype).T, alpha=scale)
    return flat.view(y.shape)


def _shapes(layer: FrozenLayer, config: LoRAConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if layer.geometry is None:
        return (config.rank, layer.in_features), (layer.out_features, config.rank)
    groups = layer.geometry.groups
    a = (config.rank, layer.in_features // groups, *layer.geometry.kernel)
    return a, (layer.out_features, config.rank // groups)


def _geometry(geometry: Geometry | None) -> Geometry:
    assert geometry is not None, "a convolution's delta always has one"
    return geometry


def _pad_widths(g: Geometry) -> list[int]:
    """Left and right width per dimension, last dimension first, as F.pad wants them."""
    widths: list[int] = []
    for i in reversed(range(len(g.kernel))):
        if isinstance(g.padding, str):
            total = g.dilation[i] * (g.kernel[i] - 1) if g.padding == "same" else 0
            widths += [total // 2, total - total // 2]
        else:
            widths += [g.padding[i], g.padding[i]]
    return widths


def _own_group(a: Tensor, groups: int) -> Tensor | None:
    """A (R, D, *kernel) cut to each row's own group, (R, D / groups, *kernel); None if a row reaches beyond it."""
    rows, width = a.shape[0] // groups, a.shape[1] // groups
    parts = [a[g * rows : (g + 1) * rows, g * width : (g + 1) * width] for g in range(groups)]
    own = torch.cat(parts)
    return own if torch.count_nonzero(own) == torch.count_nonzero(a) else None
