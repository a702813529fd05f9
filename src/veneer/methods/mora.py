"""MoRA: learn one square matrix M between a fixed compression C and a fixed decompression E.

    y' = y + E M C x        M: (R', R')    C: (R', D)    E: (O, R')    R' = sqrt((D + O) R), rounded

R' ("r-hat") makes M as large as LoRA's two factors of rank R together, while the update may have rank R' > R.
C and E hold no trained numbers and are never built in the forward pass:

    truncation   C x is the first R' inputs; E z is z, then zeros
    sharing      C x sums the inputs of each of R' groups; E z gives every output its group's value (groupings below)
    decoupling   x is cut into pieces of R', M maps each, the results stand one after the other
    rotation     as decoupling, but piece i is first turned by the angles i * 10000^(-2t / R') (rotary positions)

Source: Jiang et al. 2024, arXiv:2405.12130, eq. 4-11 and appendix A; ReMoRA (restarts with a change of grouping):
section 4.4 there. Index maps, rounding and file layout follow the authors' code, so that its adapters load here.
Departs from the paper, with that code: R' is rounded to the nearest, not down (and down to even for rotation); inputs
that do not fill the last piece are continued with the first ones again; rotation pairs t with t + R'/2. M has no alpha.

Groupings of sharing (the code's `mora_type`): strided puts index j in group j mod R', adjacent puts runs of
neighbors together, the first runs one longer where R' does not divide.

    1 inputs strided, outputs strided (the paper's run)      2 inputs adjacent, outputs adjacent
    3 inputs adjacent, outputs strided                       4 inputs strided, outputs adjacent

After restarts (ReMoRA) the change is the sum of the cycles' E M C.  C and E depend on the grouping alone and are
linear, so cycles of one grouping are one square, the sum of theirs, and the whole is at most four squares, exactly.
Its rank is at most 2 R', reached with the second cycle up to the sums that both ways of grouping have in common.  With
the other variants every cycle has the same C and E: a restart could only reset the optimizer, so it is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import ceil, sqrt
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import AdapterMismatch, ConfigError
from veneer.methods.base import METHODS, FrozenLayer, MethodConfig, Role, first_match
from veneer.methods.mora_maps import adjacent_groups, continued, spread_groups, strided_groups, sum_groups, tiled, turns
from veneer.methods.restartable import Restartable
from veneer.settings import typed

Variant = Literal["truncation", "sharing", "decoupling", "rotation"]
Grouping = Literal[1, 2, 3, 4]


@dataclass(frozen=True, kw_only=True)
class MoRAConfig(MethodConfig):
    """Settings of MoRA."""

    method: ClassVar[str] = "mora"
    rank: int = 8
    """R, at least 1: M gets as many numbers as LoRA of this rank would have."""
    variant: Variant = "rotation"
    """How inputs and outputs meet M; the authors use rotation for small ranks and sharing for large ones."""
    grouping: Grouping = 1
    """Which inputs and outputs share a row of M; only for sharing."""
    groupings: Literal[1, 2, 4] = 4
    """How many groupings restarts go through, 1 -> 2 -> ... -> 1 (1: it never changes); only for sharing."""
    dropout: float = 0.0
    """Share of the delta's inputs set to 0 in training, in [0, 1)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for modules whose path ends with, or matches, a key; the first that fits counts."""

    def __post_init__(self) -> None:
        for where, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if rank < 1:
                raise ConfigError(f"mora: {where} must be at least 1, got {rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"mora.dropout must be in [0, 1), got {self.dropout}")
        for name, choices in (("variant", Variant), ("grouping", Grouping), ("groupings", Literal[1, 2, 4])):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(map(str, get_args(choices)))
                raise ConfigError(f"mora.{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.variant != "sharing" and (self.grouping, self.groupings) != (1, 4):
            raise ConfigError(f"mora.grouping and mora.groupings belong to variant sharing, not to {self.variant}")
        if self.groupings > 1 and self.grouping > self.groupings:
            raise ConfigError(f"mora.grouping {self.grouping} is not among the first {self.groupings} (mora.groupings)")

    def at(self, path: str) -> Self:
        return replace(self, rank=first_match(self.rank_pattern, path, self.rank), rank_pattern={})


@dataclass(frozen=True, kw_only=True)
class RegroupedConfig(MoRAConfig):
    """Settings of an adapter whose cycles, between restarts, had several groupings; no recipe says these."""

    finished: tuple[Grouping, ...] = ()
    """Groupings that have a square besides the one in use, rising."""

    def __post_init__(self) -> None:
        super().__post_init__()
        among = {*self.finished, self.grouping}
        if self.variant != "sharing" or sorted(among - {self.grouping}) != list(self.finished):
            raise ConfigError(
                f"mora: squares of groupings {list(self.finished)} beside grouping {self.grouping} of variant "
                f"{self.variant}; other groupings, each once and rising, belong to variant sharing"
            )


@METHODS.add("mora")
class MoRA(Restartable):
    """The MoRA delta of one linear layer: one parameter m (R', R')."""

    Config = MoRAConfig
    roles: ClassVar[Mapping[str, Role]] = {"m": "square"}

    def __init__(self, layer: FrozenLayer, config: MoRAConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.variant, self.groupings = config.variant, config.groupings
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.side = checked_side(layer, config)
        self.m = nn.Parameter(torch.zeros(self.side, self.side))
        self.dropout = nn.Dropout(config.dropout)
        self.cos: Tensor
        self.sin: Tensor
        cos, sin = turns(self.side, ceil(self.in_features / self.side))
        self.register_buffer("cos", cos if self.variant == "rotation" else None, persistent=False)
        self.register_buffer("sin", sin if self.variant == "rotation" else None, persistent=False)
        self.to(layer.device)
        self._grouping: Tensor  # not moved: a number that is asked for in each pass
        self.register_buffer("_grouping", torch.tensor(config.grouping))  # restarts move it on, checkpoints keep it
        finished = config.finished if isinstance(config, RegroupedConfig) else ()
        self.past = {f"m{grouping}": torch.zeros_like(self.m.detach()) for grouping in finished}

    @property
    def grouping(self) -> Grouping:
        """The grouping in use, which restarts move on."""
        return get_args(Grouping)[int(self._grouping) - 1]  # type: ignore[no-any-return]

    @classmethod
    def refuse_layer(cls, layer: FrozenLayer, config: MoRAConfig) -> None:
        checked_side(layer, config)

    @torch.no_grad()
    def restart_(self, rng: torch.Generator) -> None:
        """Set M to 0; sharing moves on to its next grouping, or the summed update would keep rank R'."""
        self.m.zero_()
        if self.variant == "sharing" and self.groupings > 1:
            self._grouping.fill_(self.grouping % self.groupings + 1)

    @classmethod
    def refuse_restarts(cls, config: MoRAConfig) -> None:
        if config.variant == "sharing" and config.groupings > 1:
            return
        same = "mora.groupings 1" if config.variant == "sharing" else f"mora.variant {config.variant}"
        raise ConfigError(
            f"{same} gains nothing from restarts: every cycle meets the layer in the same way, so cycles add up to one "
            "square matrix, as in a run without restarts; use variant sharing with groupings 2 or 4, or "
            "leave restarts out"
        )

    @torch.no_grad()
    def remember_(self) -> None:
        self.past = {f"m{grouping}": m.detach().clone() for grouping, m in self._squares().items()}

    def now(self, config: MoRAConfig) -> MoRAConfig:
        own = {f.name: getattr(config, f.name) for f in fields(MoRAConfig)}
        finished = tuple(grouping for grouping in sorted(self._finished()) if grouping != self.grouping)
        kind = partial(RegroupedConfig, finished=finished) if finished else MoRAConfig
        return kind(**{**own, "grouping": self.grouping})

    def _finished(self) -> dict[Grouping, Tensor]:
        """The square of each grouping that finished cycles had; other variants know grouping 1 alone."""
        return {grouping: self.past[key] for grouping in get_args(Grouping) if (key := f"m{grouping}") in self.past}

    def _squares(self) -> dict[Grouping, Tensor]:
        """The past and the present M together, by grouping; the one in use is the last."""
        squares, now = self._finished(), self.grouping
        before = squares.pop(now, None)
        return {**squares, now: self.m if before is None else self.m + before}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., D), y (..., O); R' * R' multiply-adds a row for truncation and sharing, R' * min(D, O) otherwise."""
        x = x.to(y.dtype)
        if not self.past_in_weight:
            for grouping, m in self._finished().items():
                y = self._added(x, y, m, grouping)
        return self._added(self.dropout(x), y, self.m, self.grouping)

    def _added(self, x: Tensor, y: Tensor, m: Tensor, grouping: Grouping) -> Tensor:
        """y + E M C x."""
        m = m.to(y.dtype)
        if self.variant == "truncation":
            return torch.cat([y[..., : self.side] + F.linear(x[..., : self.side], m), y[..., self.side :]], dim=-1)
        if self.variant == "sharing":
            z = F.linear(sum_groups(x, self.side, grouping in (1, 4)), m)
            return y + spread_groups(z, self.out_features, grouping in (1, 3))
        return y + self._by_pieces(x, m)

    def _by_pieces(self, x: Tensor, m: Tensor) -> Tensor:
        """Decoupling and rotation: x (..., D) -> (..., O); only the pieces that reach an output are worked on."""
        pieces = min(ceil(self.in_features / self.side), ceil(self.out_features / self.side))
        x = continued(x, self.side)[..., : pieces * self.side].reshape(*x.shape[:-1], pieces, self.side)
        if self.variant == "rotation":
            first, second = x.chunk(2, dim=-1)
            cos, sin = self.cos[:pieces].to(x.dtype), self.sin[:pieces].to(x.dtype)
            x = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return tiled(F.linear(x, m).flatten(-2), self.out_features)

    def fold(self, w: Tensor) -> Tensor:
        return self._folded(w, self._squares())

    def fold_past(self, w: Tensor) -> Tensor:
        return self._folded(w, self._finished())

    def _folded(self, w: Tensor, squares: Mapping[Grouping, Tensor]) -> Tensor:
        """W + the sum of E M C."""
        for grouping, m in squares.items():
            m = m.to(w.dtype)
            if self.variant == "truncation":
                w = w + F.pad(m, (0, self.in_features - self.side, 0, self.out_features - self.side))
            elif self.variant == "sharing":
                w = w + self._columns(m, grouping)[self._output_groups(grouping)]
            else:
                w = w + self._piecewise(m)
        return w

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """M C and E for truncation and sharing, of rank R', those of all groupings side by side; decoupling and
        rotation repeat M and have more rank.
        """
        if self.variant not in ("truncation", "sharing"):
            return None
        pairs = [self._factors(m.detach(), grouping) for grouping, m in self._squares().items()]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)

    def _factors(self, m: Tensor, grouping: Grouping) -> tuple[Tensor, Tensor]:
        if self.variant == "truncation":
            e = torch.eye(self.out_features, self.side, device=m.device)
            return F.pad(m, (0, self.in_features - self.side)), e
        e = F.one_hot(self._output_groups(grouping), self.side)
        return self._columns(m, grouping), e.to(m.device, m.dtype)

    def _output_groups(self, grouping: Grouping) -> Tensor:
        return (strided_groups if grouping in (1, 3) else adjacent_groups)(self.out_features, self.side)

    def _columns(self, m: Tensor, grouping: Grouping) -> Tensor:
        """M C (R', D) of sharing: each input's column is its group's column of M."""
        d, side = self.in_features, self.side
        if grouping in (2, 3):
            return m[:, adjacent_groups(d, side)]
        columns = m[:, strided_groups(d, side)]
        again = -d % side  # the first inputs are counted once more, in the last groups
        columns[:, :again] += m[:, side - again :]
        return columns

    def _piecewise(self, m: Tensor) -> Tensor:
        """The update (O, D) of decoupling and rotation: M, turned, along the diagonal; more outputs repeat the rows."""
        d, o, side, half = self.in_features, self.out_features, self.side, self.side // 2
        pieces = ceil(d / side)
        update = m.new_zeros(pieces * side, d)
        for i in range(min(pieces, ceil(o / side))):
            block = m
            if self.variant == "rotation":
                left, right, cos, sin = m[:, :half], m[:, half:], self.cos[i].to(m.dtype), self.sin[i].to(m.dtype)
                block = torch.cat([left * cos + right * sin, right * cos - left * sin], dim=1)
            columns = (torch.arange(side, device=m.device) + i * side) % d
            update[i * side : (i + 1) * side].index_add_(1, columns, block)
        return update.repeat(ceil(o / (pieces * side)), 1)[:o]

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: MoRAConfig) -> int:
        """R'^2, about R (D + O)."""
        return side_of(layer.in_features, layer.out_features, config) ** 2

    @classmethod
    def n_past(cls, layer: FrozenLayer, config: MoRAConfig, cycles: int) -> int:
        """A square for each grouping that a cycle had."""
        return min(cycles, config.groupings) * cls.n_params(layer, config)

    def tensors(self) -> dict[str, Tensor]:
        """The authors' layout, in which both of LoRA's names hold M; several groupings: a square under each number."""
        squares = self._squares()
        if len(squares) > 1:
            return {f"mora_{grouping}.weight": squares[grouping] for grouping in sorted(squares)}
        (m,) = squares.values()
        return {"lora_A.weight": m, "lora_B.weight": m.detach().clone()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        super().check(tensors)
        if "lora_A.weight" in tensors and not torch.equal(tensors["lora_A.weight"], tensors["lora_B.weight"]):
            raise AdapterMismatch("lora_A.weight: differs from lora_B.weight, but MoRA saves its one matrix as both")

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        self.check(tensors)
        others = [grouping for grouping in self._finished() if grouping != self.grouping]
        now = f"mora_{self.grouping}.weight" if others else "lora_A.weight"
        self.m.copy_(tensors[now])
        self.past = {f"m{n}": tensors[f"mora_{n}.weight"].to(self.m.device, self.m.dtype, copy=True) for n in others}

    @classmethod
    def to_peft(cls, config: MoRAConfig) -> dict[str, Any]:
        """As the authors' fork of PEFT writes it; truncation and decoupling, which it lacks, get a name it refuses,
        and several groupings, which nobody else knows, a `peft_type` of their own.
        """
        named = {"rotation": 6, "sharing": config.grouping}
        fields = {
            "peft_type": "LORA",
            "use_mora": True,
            "mora_type": named.get(config.variant, config.variant),
            "r": config.rank,
            "lora_alpha": config.rank,
            "lora_dropout": config.dropout,
            "rank_pattern": dict(config.rank_pattern),
            "init_lora_weights": True,
            "bias": "none",
        }
        if isinstance(config, RegroupedConfig) and config.finished:
            fields |= {"peft_type": "REMORA", "mora_finished_types": list(config.finished)}
        return fields

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> MoRAConfig | None:
        if fields.get("peft_type") not in ("LORA", "REMORA") or not fields.get("use_mora"):
            return None
        unread = [k for k, v in fields.items() if k.startswith("use_") and v and k not in ("use_mora", "use_rslora")]
        unread += [k for k in ("bias", "layer_replication") if fields.get(k, "none") not in _UNSET]
        if unread:
            raise AdapterMismatch(f"this MoRA adapter uses {', '.join(unread)}, which veneer does not read")
        kind = fields.get("mora_type", 1)
        if kind not in _VARIANTS:
            raise AdapterMismatch(f"this MoRA adapter has mora_type {kind!r}; known: {', '.join(map(str, _VARIANTS))}")
        settings = {
            "rank": fields.get("r", 8),
            "dropout": fields.get("lora_dropout", 0.0),
            "rank_pattern": fields.get("rank_pattern") or {},
            **_VARIANTS[kind],
        }
        if fields["peft_type"] == "REMORA":
            return typed("method", "mora", RegroupedConfig, {**settings, "finished": fields.get("mora_finished_types")})
        return typed("method", "mora", MoRAConfig, settings)


_UNSET: tuple[Any, ...] = ("none", None, [], {})
_VARIANTS: dict[Any, dict[str, Any]] = {
    **{n: {"variant": "sharing", "grouping": n} for n in get_args(Grouping)},
    6: {"variant": "rotation"},
    "truncation": {"variant": "truncation"},
    "decoupling": {"variant": "decoupling"},
}
"""Settings by a folder's `mora_type`; the last two names are our own."""


def side_of(d: int, o: int, config: MoRAConfig) -> int:
    """R', rows and columns of M: sqrt((D + O) R) rounded half up; down to even for rotation, which turns pairs."""
    side = int(sqrt((d + o) * config.rank) + 0.5)
    return side - side % 2 if config.variant == "rotation" else side


def checked_side(layer: FrozenLayer, config: MoRAConfig) -> int:
    """R' for the layer; raises ConfigError where M would be larger than the layer's own matrix."""
    d, o = layer.in_features, layer.out_features
    side, narrow = side_of(d, o, config), min(d, o)
    if side > narrow:
        fits = max((r for r in range(1, config.rank) if side_of(d, o, replace(config, rank=r)) <= narrow), default=0)
        advice = f"use at most rank {fits} for it (rank_pattern), or" if fits else "no rank fits it:"
        raise ConfigError(
            f"mora.rank {config.rank} makes a square matrix of side {side} for a layer with {d} inputs and {o} "
            f"outputs, wider than the layer; {advice} exclude it"
        )
    if side < 2 and config.variant == "rotation":
        raise ConfigError(f"mora.variant rotation needs a side of 2 or more; {d} inputs and {o} outputs give {side}")
    return side
