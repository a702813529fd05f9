"""Turn an adapter of any method into plain LoRA, which every LoRA server reads.

A method that has factors (LoRA, AdaLoRA, MoRA with sharing or truncation) becomes an equal LoRA of their rank.
Any other change of a weight (MoRA with rotation or decoupling, DoRA, full fine-tuning, (IA)^3) becomes the best LoRA of
a rank that has to be given, by singular value decomposition, and the error is returned with it.

All layers get one rank, filled up with zeros, and alpha = rank, because some servers read no per-layer settings.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.deltas import DeltaPart
from veneer.adapters.layer_view import layer_at
from veneer.adapters.targets import Targeting
from veneer.base.device import Device
from veneer.errors import ConfigError, NotFoldable, listed
from veneer.methods.base import METHODS, Delta, FrozenLayer, config_from


@dataclass(frozen=True)
class AsLoRA:
    """A LoRA adapter made from another one."""

    adapter: Adapter
    """Not attached."""
    errors: dict[str, float]
    """By module path, the part of the update that was lost: ||difference|| / ||update||, 0 where it is equal."""

    @property
    def exact(self) -> bool:
        """Whether it does the same as the one it was made from, up to rounding."""
        return not any(self.errors.values())


@torch.no_grad()
def as_lora(adapter: Adapter, rank: int | None = None, *, progress: Callable[[], object] = lambda: None) -> AsLoRA:
    """The LoRA of `rank` nearest to an adapter; None: the smallest rank that is equal.

    progress    is called after each layer

    Raises NotFoldable, for all layers at once, where a delta is no change of a linear layer's weight alone, and
    ConfigError where it has no equal LoRA of small rank and none was given.
    """
    layers = {path: layer_at(adapter.model, path) for path in adapter.deltas}
    _refuse_what_lora_cannot_say(adapter, layers)
    factors = {path: delta.factors() for path, delta in adapter.deltas.items()}
    dense = [path for path, f in factors.items() if f is None]
    if rank is None and dense:
        raise ConfigError(
            f"{adapter.kind}: the update of {len(dense)} layers ({dense[0]}, ...) has no small rank, so there "
            "is no equal LoRA; give a rank, and the nearest LoRA of that rank is made and its error reported"
        )
    rank = max(f[0].shape[0] for f in factors.values() if f is not None) if rank is None else rank
    config = config_from("lora", {"rank": rank, "alpha": float(rank)})
    deltas: dict[str, Delta] = {}
    errors: dict[str, float] = {}
    for path, delta in adapter.deltas.items():
        a, b, errors[path] = _of_rank(rank, factors[path], delta, layers[path])
        deltas[path] = METHODS["lora"](layers[path], config, torch.Generator().manual_seed(0))
        deltas[path].load_({"lora_A.weight": a, "lora_B.weight": b})
        progress()
    part = DeltaPart(adapter.base, config, Targeting(targets=tuple(deltas)), deltas)
    parts = [part, *(other for other in adapter.parts if not other.deltas)]
    made = Adapter(adapter.base, parts, adapter.base_name)
    made.new_tokens = adapter.new_tokens
    return AsLoRA(made, errors)


def _refuse_what_lora_cannot_say(adapter: Adapter, layers: dict[str, FrozenLayer]) -> None:
    problems = []
    for path, delta in adapter.deltas.items():
        layer = layers[path]
        if layer.kind != "linear":
            problems.append(f"{path} is a layer of kind {layer.kind}")
            continue
        try:
            delta.fold(layer.weight())
        except NotFoldable as error:
            problems.append(f"{path}: {error}")
            continue
        if layer.bias is not None and not torch.equal(delta.fold_bias(layer.bias()), layer.bias()):
            problems.append(f"{path}: its bias is changed too")
    if problems:
        raise NotFoldable(f"this {adapter.kind} adapter cannot be said in LoRA:\n{listed(problems)}")


def _of_rank(
    rank: int, factors: tuple[Tensor, Tensor] | None, delta: Delta, layer: FrozenLayer
) -> tuple[Tensor, Tensor, float]:
    """A (rank, D), B (O, rank) and the relative error."""
    if factors is not None and factors[0].shape[0] <= rank:
        a, b = factors
        return F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a))), 0.0
    w = layer.weight()
    w = w.to(Device(w.device).wide_dtype)
    update = delta.fold(w) - w
    u, values, vt = torch.linalg.svd(update, full_matrices=False)
    root = values[:rank].sqrt()
    a, b = root[:, None] * vt[:rank], u[:, :rank] * root
    lost = (values[rank:].square().sum() / values.square().sum().clamp_min(torch.finfo(w.dtype).tiny)).sqrt().item()
    missing = rank - len(a)
    return F.pad(a, (0, 0, 0, max(missing, 0))).float(), F.pad(b, (0, max(missing, 0))).float(), lost
