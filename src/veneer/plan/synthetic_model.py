"""The model of a recipe with made weights: its first blocks in their real shapes and storage, computed as if trained.

What a block computes does not depend on the numbers in its weights, so none are read.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base.device import CPU
from veneer.base.load import compute_with_
from veneer.base.quantize import Quantizer
from veneer.models.skeleton import build_skeleton
from veneer.plan.meta_model import Plain
from veneer.storage import Storage, StorageConfig
from veneer.storage.layers import store_weight

PATTERN = 1 << 20
"""Numbers that are drawn; a larger weight repeats them."""


def made_model(plain: Plain) -> Any:
    """The first two blocks with embeddings and head, frozen; one weight at a time is dense where it is quantized.

    Its input requires a gradient, as that of every block but the first does when deltas lie below.
    """
    model = build_skeleton(plain.folder, CPU.dtype(plain.recipe.train.dtype), blocks=2)
    drawn = pattern()
    if plain.storage is not None:

        def quantized(w: Tensor, config: StorageConfig, name: str) -> Storage:
            return store_weight(like(w, drawn), config, name)

        Quantizer(plain.storage, kept=quantized).on_whole_model(model)
        compute_with_(model, plain.storage, CPU)
    _fill_(model.modules(), drawn)
    model.get_input_embeddings().register_forward_hook(_wanting_gradient)
    return model.eval().requires_grad_(False)


def pattern() -> Tensor:
    """The numbers that are drawn."""
    return torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))


def _fill_(modules: Iterable[nn.Module], drawn: Tensor) -> None:
    """Numbers in the place of every parameter without; one that several modules share stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(like(parameter, drawn), requires_grad=False)
                module._parameters[name] = made[id(parameter)]


def like(w: Tensor, drawn: Tensor) -> Tensor:
    """Numbers of w's shape and type that keep activations at their size: a matrix has rows of length 1, a vector 1s."""
    made = torch.ones(w.shape, dtype=w.dtype)
    if w.dim() < 2:
        return made
    flat, values = made.view(-1), (drawn * w.shape[-1] ** -0.5).to(w.dtype)
    for start in range(0, flat.numel(), PATTERN):
        part = flat[start : start + PATTERN]
        part.copy_(values[: part.numel()])
    return made


def _wanting_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(torch.is_grad_enabled())
