"""Memory needed to initialize the adapter, where its init decomposes a weight (PiSSA) or layers' inputs (EVA).

Deltas are made one after the other, so the layer that takes most counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapters.layer_view import layer_at
from veneer.methods.base import METHODS, MethodConfig
from veneer.plan.activation_trace import foreseeing
from veneer.plan.memory_tracker import Ledger
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import NONE


@dataclass(frozen=True)
class Beginning:
    """Bytes."""

    fixed: int = 0
    """Kept by deltas besides what is trained."""
    making: int = 0
    """Most that is alive while one delta is made, besides the others."""
    seen: int = 0
    """What is known of what all layers are fed, until the deltas are made."""
    looking: int = 0
    """Most that is alive while one layer's inputs are taken in."""


def beginning_of(plain: Plain, model: nn.Module, tokens: int) -> Beginning:
    """For the model without weights; micro-batches have at most so many tokens."""
    if plain.recipe.method.name == NONE:
        return Beginning()
    config, paths = plain.targets(model)
    known = [*model.parameters(), *model.buffers()]
    found: dict[str, Beginning] = {}
    fixed = seen = 0
    with foreseeing(plain.recipe):
        for path in paths:
            layer, own = layer_at(model, path), config.at(path)
            key = f"{layer.kind} {layer.in_features} {layer.out_features} {layer.geometry} {own}"
            if key not in found:
                found[key] = _of_layer(model, path, own, known, tokens)
            fixed, seen = fixed + found[key].fixed, seen + found[key].seen
    most = [max((getattr(one, part) for one in found.values()), default=0) for part in ("making", "looking")]
    return Beginning(fixed, most[0], seen, most[1])


def _of_layer(model: nn.Module, path: str, config: MethodConfig, known: list[Tensor], tokens: int) -> Beginning:
    layer, method = layer_at(model, path), METHODS[config.method]
    with Ledger(known) as ledger:
        delta = method(layer, config, torch.Generator())
    fixed = sum(b.nbytes for b in delta.buffers())
    if (init := config.data_init) is None:
        return Beginning(fixed, ledger.peak)
    watch = init.watch(config)
    with Ledger(known) as looking:
        for _ in range(2):  # from the second on there is something to add to
            watch.see(torch.empty(tokens, layer.in_features, device="meta"))
    return Beginning(fixed, ledger.peak, looking.live, looking.peak)
