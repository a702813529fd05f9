"""An adapter whose parameters have left their start, and what a toy model says with it."""

import torch
from torch import Tensor, nn

from tests.golden.toys import inputs, outputs
from tests.methods.layers import moved
from veneer.adapters.adapter import Adapter

X = inputs("llama")


def shake(adapter: Adapter) -> Adapter:
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.3, seed=n)
    return adapter.eval()


@torch.no_grad()
def shown(model: nn.Module, x: Tensor = X) -> Tensor:
    return outputs(model, x)
