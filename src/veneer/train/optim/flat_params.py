"""Many parameters as views of one buffer, their gradients as views of another: one kernel call steps them all.

Each parameter begins at a multiple of ALIGN numbers, so a block of 8-bit state belongs to one parameter, and a step
over any whole number of blocks computes the same bits as one over all. What lies between is 0 and stays 0.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.base.device import Device
from veneer.errors import TrainingError

ALIGN = 256
"""Numbers; also the block of 8-bit state."""
TRIMMED = 2**24
"""Numbers after which the memory that they took before goes back to the system."""


def accumulator(parameter: nn.Parameter) -> Any:
    """The node at which a parameter's gradients arrive; autograd makes one for each graph unless somebody holds it."""
    function: Any = parameter.view_as(parameter).grad_fn
    return function.next_functions[0][0]


class Flat:
    """The buffers, and where each parameter lies in them.

    A gradient goes into its buffer as soon as autograd has it, so it is held once. `parameter.grad` stays what it is
    elsewhere: None, or the gradient.

    gradients   whether to keep a buffer of them; without one, `padded` is each as the buffer would have it
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, gradients: bool = True) -> None:
        self.parameters = list(parameters)
        if wrong := {p.dtype for p in self.parameters} - {torch.float32}:
            raise TrainingError(f"trained parameters are kept in float32, got {', '.join(map(str, wrong))}")
        self.starts = [0]
        for p in self.parameters:
            self.starts.append(self.starts[-1] + -(-p.numel() // ALIGN) * ALIGN)
        self.values = torch.empty(self.size, device=self.device)
        for index, (p, view) in enumerate(zip(self.parameters, self.views(self.values), strict=True)):
            start, stop = self.starts[index], self.starts[index + 1]
            view.copy_(p.detach())
            self.values[start + p.numel() : stop] = 0
            p.data = view
            if start // TRIMMED != stop // TRIMMED:
                Device(self.device).trim()  # what it took before goes back, so that both are never there as a whole
        self.gradients = torch.zeros(self.size if gradients else 0, device=self.device)
        self._gradients = self.views(self.gradients) if gradients else []
        for index, p in enumerate(self.parameters if gradients else ()):
            p.register_post_accumulate_grad_hook(partial(self._take, index))  # type: ignore[no-untyped-call]
        self._nodes = [accumulator(p) for p in self.parameters]  # else made anew amid every forward pass's tensors

    @property
    def size(self) -> int:
        """Numbers in a buffer, those between parameters included."""
        return self.starts[-1]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def place(self, index: int) -> slice:
        """Where a parameter lies in a buffer, whole blocks."""
        return slice(self.starts[index], self.starts[index + 1])

    def padded(self, index: int, gradient: Tensor) -> Tensor:
        """A parameter's gradient as it would lie in a buffer: in one row, 0 behind it to the end of the block."""
        place, row = self.place(index), gradient.reshape(-1)
        missing = place.stop - place.start - len(row)
        return F.pad(row, (0, missing)) if missing else row

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Each parameter's own part of a buffer of `size`, in its shape."""
        return [
            buffer[start : start + p.numel()].view(p.shape)
            for p, start in zip(self.parameters, self.starts, strict=False)
        ]

    def spans(self, counts: Sequence[int]) -> list[range]:
        """Where the first counts[0] parameters lie, then the next counts[1], and so on."""
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + count)
        return [range(self.starts[a], self.starts[b]) for a, b in pairwise(ends)]

    def gather(self) -> Tensor:
        """All gradients in their buffer.  Raises TrainingError if a parameter has none."""
        missing = sum(p.grad is None for p in self.parameters)
        if missing:
            raise TrainingError(f"{missing} of {len(self.parameters)} parameters have no gradient to step with")
        for index, p in enumerate(self.parameters):
            self._take(index, p)
        return self.gradients

    @torch.no_grad()
    def _take(self, index: int, parameter: Tensor) -> None:
        view = self._gradients[index]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad)
            parameter.grad = view
