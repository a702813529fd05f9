"""Less memory for more time: activations of a block are computed again in the backward pass (arXiv:1604.06174).

Departs from transformers' own switch, which needs blocks in training mode: some then drop activations of the frozen
model (OPT), and by the time of the backward pass a block could find another attention function set than in the forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint

from veneer.errors import ModelError
from veneer.models.blocks import blocks_of
from veneer.models.documents import attending_with
from veneer.train.activations import ActivationFile


@contextmanager
def recomputing(model: Any, wanted: bool, inputs: ActivationFile | None = None) -> Iterator[None]:
    """Inside, each block's activations are recomputed in the backward pass, with the same dropout as before.

    inputs    where the blocks' inputs are kept meanwhile; None is memory
    Raises ModelError if the model has no blocks that can be.
    """
    blocks = list(blocks_of(model).values()) if wanted else []
    if wanted and not blocks:
        raise ModelError(f"{type(model).__name__} has no blocks that can be recomputed; set train.recompute to false")
    for block in blocks:
        block.forward = _recomputed(block.forward, model, inputs)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is seen again


def _recomputed(forward: Callable[..., Any], model: Any, inputs: ActivationFile | None) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        attention = model.config._attn_implementation

        def same(*args: Any, **kwargs: Any) -> Any:
            with attending_with(model, attention):
                return forward(*args, **kwargs)

        with nullcontext() if inputs is None else inputs.saving():
            return checkpoint(same, *args, use_reentrant=False, **kwargs)

    return run
