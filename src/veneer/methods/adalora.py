"""AdaLoRA: learn an update in the form of a singular value decomposition, and drop its least important triplets.

    y' = y + s B diag(e) A x        A: (R, D)    e: (R,)    B: (O, R)    s = alpha / (R + 1e-5)

Triplet i is row i of A, entry i of e and column i of B.  A training starts with R of them on every layer and ends with
`target_rank` on average: every so often the layers' triplets are scored together and those with the lowest scores get
e = 0, from where they may come back.  The score (`sensitivity`, `triplet_scores`), the schedule (`budget`), the choice
(`choose`) and the penalty (`orthogonality`) are pure functions; `penalty` and `stepped_` put them together, and the
training loop calls these.

Source: Zhang et al. 2023, arXiv:2303.10512, eq. 3 and 8-13, and the authors' code where the paper is silent.
Departs from the paper, with that code: the penalty is the mean of Frobenius norms, not the sum of their squares.
Departs from both: exactly as many triplets are kept as the budget says, where scores tie too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import AdapterMismatch, ConfigError
from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig, Role, first_match
from veneer.settings import typed


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(MethodConfig):
    """Settings of AdaLoRA."""

    method: ClassVar[str] = "adalora"
    rank: int = 12
    """R, triplets of every layer at the start, at least 1."""
    target_rank: int = 8
    """Triplets a layer has on average at the end, 1 to rank."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank (no unit)."""
    dropout: float = 0.0
    """Share of the delta's inputs set to 0 in training, in [0, 1)."""
    start: int = 0
    """Optimizer steps at the beginning in which every triplet is kept."""
    final: int = 0
    """Optimizer steps at the end in which the choice no longer changes."""
    every: int = 1
    """Optimizer steps from one choice to the next, at least 1."""
    beta1: float = 0.85
    """Decay of a sensitivity's running mean, in (0, 1)."""
    beta2: float = 0.85
    """Decay of its uncertainty's running mean, in (0, 1)."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps A's rows and B's columns orthogonal, at least 0."""
    kept: int | None = None
    """Triplets of a layer, if fewer than rank: for an adapter stored without the dropped ones."""
    kept_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other `kept` for modules whose path ends with, or matches, a key; the first that fits counts."""

    def __post_init__(self) -> None:
        low = {"rank": 1, "target_rank": 1, "start": 0, "final": 0, "every": 1, "orthogonality": 0}
        problems = [f"adalora.{k} must be at least {n}, got {v}" for k, n in low.items() if (v := getattr(self, k)) < n]
        problems += [
            f"adalora.{k} must be in (0, 1), got {v}" for k in ("beta1", "beta2") if not 0 < (v := getattr(self, k)) < 1
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"adalora.dropout must be in [0, 1), got {self.dropout}")
        if self.target_rank > self.rank:
            problems.append(
                f"adalora.target_rank {self.target_rank} is above adalora.rank {self.rank}, where it starts"
            )
        for n in [*self.kept_pattern.values(), *([] if self.kept is None else [self.kept])]:
            if not 0 <= n <= self.rank:
                problems.append(f"adalora.kept must be from 0 to rank {self.rank}, got {n}")
        if problems:
            raise ConfigError("\n".join(problems))

    def at(self, path: str) -> Self:
        return replace(self, kept=first_match(self.kept_pattern, path, self.kept), kept_pattern={})

    @property
    def triplets(self) -> int:
        """Triplets of one layer."""
        return self.rank if self.kept is None else self.kept


@METHODS.add("adalora")
class AdaLoRA(Delta):
    """The AdaLoRA delta of one linear layer: a (R, D), e (R,), b (O, R)."""

    Config = AdaLoRAConfig
    roles: ClassVar[Mapping[str, Role]] = {"a": "in", "e": "scale", "b": "out"}

    def __init__(self, layer: FrozenLayer, config: AdaLoRAConfig, rng: torch.Generator) -> None:
        super().__init__(layer, config, rng)
        self.scale = config.alpha / (config.rank + 1e-5)
        self.a = nn.Parameter(torch.empty(config.triplets, layer.in_features).normal_(0.0, 0.02, generator=rng))
        self.e = nn.Parameter(torch.zeros(config.triplets))
        self.b = nn.Parameter(torch.empty(layer.out_features, config.triplets).normal_(0.0, 0.02, generator=rng))
        self.dropout = nn.Dropout(config.dropout)
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"{name}_mean", torch.zeros(parameter.shape))
            self.register_buffer(f"{name}_uncertainty", torch.zeros(parameter.shape))
        self.to(layer.device)

    @torch.no_grad()
    def keep_(self, kept: Tensor) -> None:
        """Set e to 0 where kept (R,) bool is false; the triplet may come back later."""
        self.e.masked_fill_(~kept.to(self.e.device), 0.0)

    @classmethod
    def penalty(cls, deltas: Sequence[Any], config: AdaLoRAConfig) -> Tensor | None:
        return orthogonality(deltas) * config.orthogonality if config.orthogonality else None

    @classmethod
    def stepped_(cls, deltas: Sequence[Any], config: AdaLoRAConfig, step: int, steps: int) -> None:
        """Remember every sensitivity and, when it is time, keep the triplets that the budget allows.

        Raises ConfigError for a run that is no longer than its first and last steps without a choice.
        """
        if steps <= config.start + config.final:
            raise ConfigError(
                f"adalora.start {config.start} and adalora.final {config.final} leave none of the run's {steps} steps "
                "for dropping triplets; lower them, or train longer"
            )
        learning = step < steps - config.final
        memories = [delta.remembered_(config, learning) for delta in deltas]
        most, now = budget(step, steps, len(deltas), config)
        if now:
            scores = {str(i): triplet_scores(*memory) for i, memory in enumerate(memories)}
            for index, kept in choose(scores, most).items():
                deltas[int(index)].keep_(kept)

    def remembered_(self, config: AdaLoRAConfig, learning: bool) -> list["Importance"]:
        """The importances of a, e and b, brought up to date with this step's gradients while they are learned."""
        found = []
        for name, w in self.named_parameters():
            mean, uncertainty = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_uncertainty")
            if learning and w.grad is not None:
                now = sensitivity(Importance(mean, uncertainty), w, w.grad, config)
                mean.copy_(now.mean)
                uncertainty.copy_(now.uncertainty)
            found.append(Importance(mean, uncertainty))
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., D), y (..., O)."""
        z = F.linear(self.dropout(x.to(y.dtype)), self.a.to(y.dtype)) * self.e.to(y.dtype)
        return y + F.linear(z, self.b.to(y.dtype)) * self.scale

    def fold(self, w: Tensor) -> Tensor:
        return w + (self.b * self.e).to(w.dtype) @ self.a.to(w.dtype) * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a.detach(), (self.b * self.e).detach() * self.scale

    @classmethod
    def n_params(cls, layer: FrozenLayer, config: AdaLoRAConfig) -> int:
        """R (D + O + 1)."""
        return config.triplets * (layer.in_features + layer.out_features + 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A": self.a, "lora_B": self.b, "lora_E": self.e.reshape(-1, 1)}

    @classmethod
    def to_peft(cls, config: AdaLoRAConfig) -> dict[str, Any]:
        """PEFT needs the training's length; `total_step` is written so that its schedule counts as finished."""
        pattern = {f"{path}.lora_E": [i < n for i in range(config.rank)] for path, n in config.kept_pattern.items()}
        return {
            "peft_type": "ADALORA",
            "init_r": config.rank,
            "target_r": config.target_rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "tinit": config.start,
            "tfinal": config.final,
            "deltaT": config.every,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "orth_reg_weight": config.orthogonality,
            "total_step": config.start + config.final + 1,
            "rank_pattern": pattern or None,
            "init_lora_weights": True,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> AdaLoRAConfig | None:
        if fields.get("peft_type") != "ADALORA":
            return None
        unread = [k for k in ("use_rslora",) if fields.get(k)]
        unread += ["bias"] if fields.get("bias", "none") != "none" else []
        if unread:
            raise AdapterMismatch(f"this AdaLoRA adapter uses {', '.join(unread)}, which veneer does not read")
        rank, alpha = fields.get("init_r", 12), fields.get("lora_alpha", 8)
        pattern: Mapping[str, list[bool]] = fields.get("rank_pattern") or {}
        settings = {
            "rank": rank,
            "target_rank": min(fields.get("target_r", 8), rank),
            "alpha": alpha if alpha > 0 else rank,
            "dropout": fields.get("lora_dropout", 0.0),
            "start": fields.get("tinit", 0),
            "final": fields.get("tfinal", 0),
            "every": fields.get("deltaT", 1),
            "beta1": fields.get("beta1", 0.85),
            "beta2": fields.get("beta2", 0.85),
            "orthogonality": fields.get("orth_reg_weight", 0.5),
            "kept_pattern": {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()},
        }
        return typed("method", "adalora", AdaLoRAConfig, settings)


class Importance(NamedTuple):
    """Running statistics of one parameter's sensitivity |w g|, in the parameter's shape."""

    mean: Tensor
    """Its running mean."""
    uncertainty: Tensor
    """The running mean of its distance from that mean."""


@torch.no_grad()
def sensitivity(was: Importance | None, w: Tensor, grad: Tensor, config: AdaLoRAConfig) -> Importance:
    """The importance of a parameter after one more step with this gradient; `was` is None before the first."""
    now = (w * grad).abs()
    old = was or Importance(torch.zeros_like(now), torch.zeros_like(now))
    mean = config.beta1 * old.mean + (1 - config.beta1) * now
    return Importance(mean, config.beta2 * old.uncertainty + (1 - config.beta2) * (now - mean).abs())


def triplet_scores(a: Importance, e: Importance, b: Importance) -> Tensor:
    """The score (R,) of each triplet: of its e, plus the means over its row of A and its column of B."""
    score_a, score_e, score_b = (i.mean * i.uncertainty for i in (a, e, b))
    return score_e + score_a.mean(dim=1) + score_b.mean(dim=0)


def budget(step: int, total: int, layers: int, config: AdaLoRAConfig) -> tuple[int, bool]:
    """Triplets that all layers together may keep after `step` of `total`, and whether to choose them now.

    Falls from rank * layers to target_rank * layers with the cube of the time left (eq. 12).
    """
    first, last = config.rank * layers, config.target_rank * layers
    if step <= config.start:
        return first, False
    if step > total - config.final:
        return last, True
    left = 1 - (step - config.start) / (total - config.final - config.start)
    return int(last + (first - last) * left**3), step % config.every == 0


def choose(scores: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """Which triplets (R,) bool of each layer are among the `kept` with the highest scores of all layers."""
    every = torch.cat(list(scores.values()))
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[every.argsort(descending=True, stable=True)[:kept]] = True
    parts = chosen.tensor_split(torch.tensor([len(s) for s in scores.values()]).cumsum(0)[:-1])
    return dict(zip(scores, parts, strict=True))


def orthogonality(deltas: Iterable[AdaLoRA]) -> Tensor:
    """Mean over every A and B of ||A A^T - I|| or ||B^T B - I||; times `config.orthogonality` it joins the loss."""
    grams = [g for d in deltas for g in (d.a @ d.a.T, d.b.T @ d.b)]
    return torch.stack([torch.linalg.matrix_norm(g - torch.eye(len(g), device=g.device)) for g in grams]).mean()
