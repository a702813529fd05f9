"""Backward pass and step, in two schemes with the same result, bit for bit: step afterwards, or in the backward pass.

Afterwards: every micro-batch adds to the gradients, they are clipped together, then all parameters step.  In the
backward pass (`optimizer.in_backward`, one micro-batch): without a limit on the norm each parameter steps as soon as
its gradient is complete.  With one (`train.clip`) the pass is made twice, from the same random state: the first records
each gradient's norm and discards it, the second steps with the scale that the norms give.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import isfinite

import torch
from torch import Tensor

from veneer.data.pack import Batch
from veneer.errors import TrainingError
from veneer.tasks.base import Loss
from veneer.train.checkpoint import TrainState
from veneer.train.optim.step_in_backward import StepInBackward
from veneer.train.setup import Training


def backward_and_step(training: Training, state: TrainState, batches: Sequence[Batch]) -> tuple[float, float]:
    """Step with the gradients of these batches; returns the summed loss in nats and the norm, raises TrainingError."""
    in_backward = getattr(state.optimizer, "step_in_backward", None)
    if isinstance(in_backward, StepInBackward):
        return _in_backward(training, state, batches[0], in_backward)
    return _afterwards(training, state, batches)


def _afterwards(training: Training, state: TrainState, batches: Sequence[Batch]) -> tuple[float, float]:
    """Keep all gradients, clip them, then step."""
    supervised, total, adapter = sum(len(b.targets) for b in batches), 0.0, training.adapter
    state.optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches):
        loss = _loss(training, state, batch, supervised, number)
        loss.backward()
        total += loss.value
        del loss  # its graph, in thousands of small pieces, would lie between the next pass's tensors
    penalty = adapter.penalty()
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    _refuse_unreached(training, {n.parameter for n in adapter.named() if n.parameter.grad is not None})
    norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), training.job.recipe.train.clip or float("inf"))
    _refuse_norm(norm, state)
    state.optimizer.step()
    return total, float(norm)


def _in_backward(
    training: Training, state: TrainState, batch: Batch, in_backward: StepInBackward
) -> tuple[float, float]:
    """Step each parameter when its gradient is complete; with a limit on the norm, measure that in a pass before."""
    scale, clip = None, training.job.recipe.train.clip
    if clip:
        with training.base.device.keeping_random_state():
            _, norm = _pass(training, state, batch, in_backward, in_backward.measuring())
        _refuse_norm(norm, state)
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)  # as in torch's clip_grad_norm_
    value, norm = _pass(training, state, batch, in_backward, in_backward.stepping(scale))
    state.optimizer.step()
    return value, float(norm)


def _pass(
    training: Training,
    state: TrainState,
    batch: Batch,
    in_backward: StepInBackward,
    using: AbstractContextManager[None],
) -> tuple[float, Tensor]:
    """One pass whose gradients are used as `using` says; returns the loss in nats and the norm of them all."""
    in_backward.begin()
    loss = _loss(training, state, batch, len(batch.targets))
    with using:
        loss.backward()
    _refuse_unreached(training, set(in_backward.norms))
    norms = [in_backward.norms[p] for p in training.adapter.parameters()]
    return loss.value, torch.linalg.vector_norm(torch.stack(norms))


def _loss(training: Training, state: TrainState, batch: Batch, supervised: int, number: int = 0) -> Loss:
    """The loss of a step's micro-batch.  Raises TrainingError, which names its rows, if it is not finite."""
    job = training.job
    loss = job.task.loss(training.base, batch, supervised, packed=job.recipe.data.packing, lean=job.recipe.lean)
    if isfinite(loss.value):
        return loss
    rows = ", ".join(f"{e.source}:{e.line}" for e in (job.examples[i] for i in job.steps[state.step][number][:8]))
    raise TrainingError(
        f"step {state.step + 1}: the loss is {loss.value}, in a micro-batch of the rows {rows}; look at those rows, or "
        "try a lower optimizer.lr. The last checkpoint is whole."
    )


def _refuse_unreached(training: Training, reached: set[Tensor]) -> None:
    """Raise TrainingError for parameters that the loss does not reach."""
    named = training.adapter.named()
    unreached = [f"{n.path} {n.name}" for n in named if n.parameter not in reached]
    if unreached:
        raise TrainingError(
            f"{len(unreached)} of {len(named)} parameters get no gradient, so they would never change: "
            f"{', '.join(unreached[:4])}; leave those modules out (method.exclude)"
        )


def _refuse_norm(norm: Tensor, state: TrainState) -> None:
    if not isfinite(norm):
        raise TrainingError(f"step {state.step + 1}: the gradient's norm is {float(norm)}; try a lower optimizer.lr")
