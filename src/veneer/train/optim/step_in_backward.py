"""Step each parameter when its gradient is complete and discard the gradient (the idea of LOMO, arXiv:2306.09782).

A gradient is complete when autograd has added up all of a backward pass.  The loss makes several passes over the output
head, in chunks, and one over everything below it: hooks do nothing in the former, so gradients of the head are added to
in the latter, or used at its end.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.errors import ConfigError, TrainingError
from veneer.methods.base import METHODS, Delta
from veneer.recipe.settings import Recipe


class StepInBackward:
    """Hooks that use each gradient inside `measuring` and `stepping`; outside, gradients add up as usual."""

    def __init__(self, parameters: Sequence[nn.Parameter], step_: Callable[[int, Tensor], None]) -> None:
        self.parameters, self._step = list(parameters), step_
        self.norms: dict[Tensor, Tensor] = {}
        """Of every gradient used since `begin`, before scaling."""
        self._use: Callable[[int, Tensor], None] | None = None
        for index, p in enumerate(self.parameters):
            p.register_post_accumulate_grad_hook(partial(self._whole, index))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Before each pass over the model: forget gradients and norms of the last."""
        self.norms.clear()
        for p in self.parameters:
            p.grad = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, record each gradient's norm, then discard it; at the end, do so with earlier gradients."""
        with self._using(lambda index, gradient: None):
            yield

    @contextmanager
    def stepping(self, scale: Tensor | None = None) -> Iterator[None]:
        """Inside, each gradient times `scale` steps its parameter; at the end, earlier gradients do.

        Raises TrainingError for a gradient that is not finite: its parameter is unchanged, those before it are stepped.
        """

        def use(index: int, gradient: Tensor) -> None:
            norm = float(self.norms[self.parameters[index]])
            if not isfinite(norm):
                raise TrainingError(
                    f"the norm of a gradient is {norm}, and other parameters were stepped already "
                    "(optimizer.in_backward with train.clip 0); go on from the last checkpoint, with a lower "
                    "optimizer.lr"
                )
            self._step(index, gradient if scale is None else gradient.mul_(scale))

        with self._using(use):
            yield

    @contextmanager
    def _using(self, use: Callable[[int, Tensor], None]) -> Iterator[None]:
        self._use = use
        try:
            yield
            for index, p in enumerate(self.parameters):
                self._whole(index, p)
        finally:
            self._use = None

    @torch.no_grad()
    def _whole(self, index: int, parameter: Tensor) -> None:
        if self._use is None or parameter.grad is None:
            return
        self.norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        self._use(index, parameter.grad)
        parameter.grad = None


def check_in_backward(recipe: Recipe, adapter: Adapter, plan: Sequence[Sequence[Any]]) -> None:
    """Raise ConfigError, before the first step, where a step needs all gradients at once."""
    if not recipe.optimizer.in_backward:
        return
    most = max(len(micro_batches) for micro_batches in plan)
    if most > 1:
        rows = "raise train.micro_batch_tokens" if recipe.data.packing else "set data.packing to true"
        raise ConfigError(
            f"optimizer.in_backward keeps no gradients, but a step here adds up those of {most} micro-batches; {rows}, "
            f"or lower train.tokens_per_step ({recipe.train.tokens_per_step}), until a step is one micro-batch"
        )
    if adapter.settings is None:
        return
    method = METHODS[adapter.settings.method]
    own = method.__mro__[: method.__mro__.index(Delta)]
    if any(after in vars(c) for c in own for after in ("penalty", "stepped_")):
        raise ConfigError(
            f"optimizer.in_backward keeps no gradients, but {adapter.settings.method} uses all of them after the "
            "backward pass; set it to false"
        )
