"""Finished cycles inside the model's own weights while it trains: no extra work a step, however many there are.

The base's weights are kept, and every fold starts from them, so that rounding to the weight's number type happens once
and never adds up.  At the end they are put back, bit for bit, and the past counts beside them, as in a loaded adapter.

Only weights that are dense and belong to one layer take part.  A quantized one has no room for small changes: a restart
that moves a weight by less than half the distance of two levels would be lost (docs/decisions/0013).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layer_view import is_transposed
from veneer.base.device import Device
from veneer.errors import ConfigError
from veneer.methods.restartable import restartable
from veneer.storage.layers import Stored

Fold = Literal["auto", "weight", "beside"]


@dataclass(frozen=True)
class Rounding:
    """What keeping the folded weights in their number type has cost, over all layers together (Frobenius norms)."""

    of_weight: float
    """||stored - exact|| / ||exact||."""
    of_change: float
    """||stored - exact|| / ||exact - base||: the part of all finished cycles' change that is not seen in training."""


class Folding:
    """The weights of an adapter's layers, with and without its past in them."""

    def __init__(self, adapter: Adapter, fold: Fold) -> None:
        """Raises ConfigError, listing the layers, where `weight` is asked for and cannot be."""
        self._adapter, self._deltas = adapter, restartable(adapter.deltas)
        unfit = _unfit(adapter.model, adapter.deltas)
        if unfit and fold == "weight":
            listed = "\n".join(f"  {path}: {why}" for path, why in list(unfit.items())[:8])
            raise ConfigError(
                f"restarts.fold is weight, but {len(unfit)} of {len(adapter.deltas)} weights cannot take a change in; "
                f"use auto or beside:\n{listed}"
            )
        self.paths = [] if fold == "beside" else foldable_paths(adapter.model, adapter.deltas)
        """The layers whose weight takes the past in."""
        self._base: dict[str, Tensor] = {}

    @torch.no_grad()
    def put_(self) -> Rounding:
        """Put the base's weights with the past folded in into the model, computed in float32 and rounded once."""
        lost = whole = change = 0.0
        for path in self.paths:
            delta, weight = self._deltas[path], self._weight(path)
            if not delta.past:
                continue
            base = self._base.setdefault(path, weight.detach().clone())
            turned = is_transposed(self._adapter.model.get_submodule(path))
            w = (base.T if turned else base).float()
            exact = delta.fold_past(w)
            weight.copy_(exact.T if turned else exact)
            delta.past_in_weight = True
            stored = (weight.T if turned else weight).float()
            lost, whole = lost + _square(stored - exact), whole + _square(exact)
            change += _square(exact - w)
        tiny = torch.finfo(torch.float64).tiny
        return Rounding(sqrt(lost / max(whole, tiny)), sqrt(lost / max(change, tiny)))

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the base's own weights back."""
        for path, base in self._base.items():
            self._weight(path).copy_(base)
            self._deltas[path].past_in_weight = False
        self._base = {}

    def _weight(self, path: str) -> nn.Parameter:
        weight: nn.Parameter = self._adapter.model.get_submodule(path).get_parameter("weight")
        return weight


def foldable_paths(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Those of the layers whose weight can take a change in."""
    paths = list(paths)
    unfit = _unfit(model, paths)
    return [path for path in paths if path not in unfit]


def _unfit(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Layers whose weight cannot take a change in, and why."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for path in paths:
        module = model.get_submodule(path)
        weight = module._parameters.get("weight")
        if isinstance(module, Stored) or weight is None or not weight.is_floating_point():
            kept = type(module.storage).__name__ if isinstance(module, Stored) else type(module).__name__
            found[path] = f"it is kept as {kept}, which has no room for small changes"
        elif owners[id(weight)] > 1:
            found[path] = "it is shared with another layer (tied weights), which the change does not belong to"
    return found


def _square(t: Tensor) -> float:
    return float(t.square().sum(dtype=Device(t.device).wide_dtype))
