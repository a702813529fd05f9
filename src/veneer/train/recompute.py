"""Less memory for more time: activations of a block are computed again in the backward pass (arXiv:1604.06174)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def recomputing(model: Any, wanted: bool) -> Iterator[None]:
    """Inside, each block's activations are recomputed in the backward pass; its dropout stays off."""
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for block in blocks:
        block.training = True  # the switch that transformers looks at; its inner modules stay in eval mode
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
        model.gradient_checkpointing_disable()
