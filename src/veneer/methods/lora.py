"""LoRA: learn a rank-R update to a frozen weight.

    y' = y + s B A x        A: (R, D)    B: (O, R)    s = alpha / R, or alpha / sqrt(R) when rank-stabilized

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 and section 4.1; rank-stabilized scale: arXiv:2312.03732.
Departs from it: A starts uniform, as in the authors' code; the paper says Gaussian.  Other starts are one file each in
`init/`.  One that starts away from 0 (PiSSA) is subtracted: y' = y + s (B A - B0 A0) x with fixed A0, B0.

Embedding: y = E[token], so A x is a look-up in A: (R, V).
Convolution: A is a convolution of R channels with the layer's geometry, B a 1x1 one. With groups, each group has its
own R / groups channels, so that the update is a change of the one grouped weight.

After n - 1 restarts (ReLoRA, arXiv:2307.05695) the change is the sum of n such products, which is one of rank n R: A's
rows below each other, B's columns side by side, the same s.  It is saved in this form; only the last R are trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import AdapterMismatch, ConfigError, NotFoldable
from veneer.methods.base import (
    METHODS,
    DataInit,
    FrozenLayer,
    Geometry,
    Kind,
    MethodConfig,
    RankedConfig,
    Role,
    config_from,
)
from veneer.methods.init.base import INITS, Init, InitSetting, init_from, init_setting
from veneer.methods.restartable import Restartable


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(RankedConfig):
    """Settings of LoRA."""

    method: ClassVar[str] = "lora"
    dropout: float = 0.0
    """Share of the delta's inputs set to 0 in training, in [0, 1)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    init: InitSetting = "uniform"
    """Where A and B start: an init's name, or a mapping of its name and settings (`veneer list inits`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.method}.dropout must be in [0, 1), got {self.dropout}")
        object.__setattr__(self, "init", init_setting(self.init))
        try:
            name = self.initializer.name
        except ConfigError as error:
            lines = str(error).replace("\nIt has:", " It has:").split("\n")
            raise ConfigError("\n".join(f"{self.method}.init: {line}" for line in lines)) from None
        if name not in self.inits():
            raise ConfigError(f"{self.method}.init must be one of {', '.join(self.inits())}, got {name!r}")

    @classmethod
    def inits(cls) -> list[str]:
        """Names of the inits that the method can start from."""
        return list(INITS)

    @property
    def initializer(self) -> Init:
        """`init`, typed."""
        return init_from(self.init)

    @property
    def data_init(self) -> DataInit | None:
        init = self.initializer
        return init if isinstance(init, DataInit) else None

    @property
    def scale(self) -> float:
        """s, the factor on the update."""
        return self.alpha / (sqrt(self.rank) if self.rank_stabilized else self.rank)


@METHODS.add("lora")
class LoRA(Restartable):
    """The LoRA delta of one layer: parameters a (R, D, *kernel) and b (O, R), or (O, R / groups) in a grouped layer;
    fixed a0 and b0 where the start is subtracted.
    """

    Config = LoRAConfig
    roles: ClassVar[Mapping[str, Role]] = {"a": "in", "b": "out"}
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv", "embedding"})
    a0: Tensor | None
    b0: Tensor | None

    def __init__(self, layer: FrozenLayer, config: LoRAConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.layer, self.init = layer, config.initializer
        self.kind, self.config, self.scale = layer.kind, config, config.scale
        self.geometry, self.padding_idx = layer.geometry, layer.padding_idx
        self.in_features, self.embed_scale = layer.in_features, layer.embed_scale
        a_shape, b_shape = _shapes(layer, config)
        self.a = nn.Parameter(torch.empty(a_shape))
        self.b = nn.Parameter(torch.empty(b_shape))
        self.register_buffer("a0", None)
        self.register_buffer("b0", None)
        self.dropout = nn.Dropout(config.dropout)
        self.restart_(rng)
        self.to(layer.device)

    @classmethod
    def refuse_layer(cls, layer: FrozenLayer, config: LoRAConfig) -> None:
        groups = 1 if layer.geometry is None else layer.geometry.groups
        if config.rank % groups:
            raise ConfigError(
                f"{config.method}.rank {config.rank} is not divisible by the {groups} groups of a convolution with "
                f"{layer.in_features} inputs; use a multiple of {groups} for it (rank_pattern), or exclude it"
            )
        config.initializer.refuse_layer(layer, config.method, config.rank)

    @torch.no_grad()
    def restart_(self, rng: torch.Generator) -> None:
        a, b = self.init.factors(self, rng)
        self.a.copy_(a)
        self.b.copy_(b)
        if self.init.subtracted:
            self.register_buffer("a0", self.a.detach().clone())
            self.register_buffer("b0", self.b.detach().clone())

    def weight(self) -> Tensor:
        """The layer's weight (O, D, *kernel) at the beginning of this cycle."""
        w = self.layer.weight()
        return w if self.past_in_weight else self.fold_past(w)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Linear: x (..., D), y (..., O).  Convolution: x (B, D, *space).  Embedding: x (...) token ids."""
        if self.past and not self.past_in_weight:
            y = self._added(x, y, self.past["a"], self.past["b"])
        x = x if self.kind == "embedding" else self.dropout(x.to(y.dtype))
        if self.a0 is None or self.b0 is None:
            return self._added(x, y, self.a, self.b)
        now, start = (F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for a, b in self._pairs())
        return y + (now - start) * self.scale

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
        if not (init := config.initializer).no_change:
            raise ConfigError(
                f"{config.method}.init {init.name} starts with a change of the model, so each restart would throw it "
                "off; use uniform or gaussian with restarts"
            )

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A, B and the subtracted A0, B0."""
        assert self.a0 is not None and self.b0 is not None
        return (self.a, self.b), (self.a0, self.b0)

    def _change(self) -> tuple[Tensor, Tensor]:
        """A and B of this cycle's change, as they join the past."""
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], dim=1)

    def _whole(self) -> tuple[Tensor, Tensor]:
        """A and B of all cycles together."""
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
        if self.a0 is None or self.b0 is None:
            return self._folded(w, *self._whole())
        w = self.fold_past(w)
        now, start = (b.to(w.dtype) @ a.to(w.dtype) for a, b in self._pairs())
        return w + (now - start) * self.scale

    def now(self, config: LoRAConfig) -> LoRAConfig:
        """Settings of the one LoRA that is all cycles together."""
        return _times_rank(config, len(self._whole()[0]) // len(self._change()[0]))

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
        """A and B of each cycle, and where the start is subtracted A0 and B0."""
        return cycles * (1 + config.initializer.subtracted) * LoRA.n_params(layer, config)

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
        self.check(tensors)
        if self.a0 is not None and self.b0 is not None:
            a, b, r = tensors["lora_A.weight"], tensors["lora_B.weight"], self.config.rank
            self.a.copy_(a[:r])
            self.a0.copy_(a[r:])
            self.b.copy_(b[:, :r])
            self.b0.copy_(-b[:, r:])
            return
        if self.kind != "conv":
            super().load_(tensors)
            return
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
        init = config.initializer
        config = _times_rank(config, 2) if init.subtracted else config  # [A; A0] and [B, -B0]
        return {
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.rank_stabilized,
            "init_lora_weights": init.in_peft,
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": dict(config.alpha_pattern),
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> MethodConfig | None:
        if fields.get("peft_type") != "LORA" or any(fields.get(k) for k in ("use_dora", "use_mora")):
            return None
        _refuse_unread(fields)
        settings = {
            "rank": fields.get("r", 8),
            "alpha": fields.get("lora_alpha", 8),
            "dropout": fields.get("lora_dropout", 0.0),
            "rank_stabilized": fields.get("use_rslora", False),
            "init": _READ_AS.get(fields.get("init_lora_weights"), "uniform"),  # a trained adapter does not start again
            "rank_pattern": fields.get("rank_pattern") or {},
            "alpha_pattern": fields.get("alpha_pattern") or {},
        }
        return config_from(cls.Config.method, settings)


_NOT_READ = (
    "bias", "lora_bias", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "monteclora_config", "kasa_config",
)  # fmt: skip
"""Fields of PEFT's LoRA that change the adapter's meaning; set ones are refused, and so are all `use_...`."""
_READ_AS: dict[Any, str] = {"gaussian": "gaussian", False: "random"}
_SAME_BASE = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}
"""PEFT's initializations that leave the base weights alone; the others train against a changed base."""


def _refuse_unread(fields: Mapping[str, Any]) -> None:
    """Raise AdapterMismatch for an adapter_config.json with features that this LoRA does not have."""
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


def _times_rank(config: LoRAConfig, n: int) -> LoRAConfig:
    """The settings with n times the rank and the same scale."""
    more = sqrt(n) if config.rank_stabilized else n
    return replace(
        config,
        rank=n * config.rank,
        alpha=more * config.alpha,
        rank_pattern={k: n * rank for k, rank in config.rank_pattern.items()},
        alpha_pattern={k: more * alpha for k, alpha in config.alpha_pattern.items()},
    )


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
    """Left and right width per dimension, last dimension first, in F.pad's order."""
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
