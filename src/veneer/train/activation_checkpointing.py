"""Activation checkpointing: recompute the activations of chosen blocks in the backward pass (arXiv:1604.06174).

Departs from transformers' own switch, which needs blocks in training mode: some (OPT) then apply dropout to the frozen
model. A block is recomputed with the keyword arguments of its forward pass, and so with its attention context.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint

from veneer.base.base import Base
from veneer.errors import ConfigError, ModelError
from veneer.train.activation_offload import Inputs

Wanted = bool | int | Sequence[int]
"""All blocks, none, that many first ones, or those of these numbers, counted from 0."""
TRIMMED = 4
"""Blocks of a forward pass after which freed memory, in pieces between the blocks' inputs, goes back to the system."""


@contextmanager
def recomputing(base: Base, wanted: Wanted, inputs: Inputs | None = None) -> Iterator[None]:
    """Inside, chosen blocks' activations are recomputed in the backward pass, with the same dropout as before.

    inputs    where the blocks' inputs are kept meanwhile; None is memory
    Raises ModelError if the base has no blocks, ConfigError for a block it does not have.
    """
    blocks = chosen_blocks(base, wanted)
    for number, block in enumerate(blocks, 1):
        block.forward = _recomputed(block.forward, base, inputs, trims=number % TRIMMED == 0)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is seen again


def chosen_blocks(base: Base, wanted: Wanted) -> list[Any]:
    """The blocks that `wanted` means, in the model's order; raises as `recomputing` does.

    A count means the first ones: when their turn comes in the backward pass, what the later ones kept is free again.
    """
    if wanted is False:
        return []
    blocks = list(base.blocks.values())
    if not blocks:
        raise ModelError(f"{base.kind} has no blocks that can be recomputed; set train.recompute to false")
    if wanted is True:
        return blocks
    numbers = range(wanted) if isinstance(wanted, int) else sorted(set(wanted))
    if absent := [n for n in numbers if not 0 <= n < len(blocks)]:
        raise ConfigError(
            f"train.recompute is {wanted if isinstance(wanted, int) else list(wanted)}, but {base.kind} has "
            f"{len(blocks)} blocks, 0 to {len(blocks) - 1}; there is no block {', '.join(map(str, absent[:4]))}"
        )
    return [blocks[n] for n in numbers]


def _recomputed(forward: Callable[..., Any], base: Base, inputs: Inputs | None, *, trims: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if inputs is None else inputs.saving():
            out = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if trims:
            base.device.trim()
        return out

    return run
