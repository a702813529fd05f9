"""The middle of an optimizer step, in two schemes that give the same bits: all gradients kept, or each used at once.

Kept: every micro-batch adds to the gradients, the whole is clipped, then all parameters step.  At once
(`optimizer.in_backward`, one micro-batch): without a limit on the norm each parameter steps as soon as its gradient is
whole.  With one (`train.clip`) the pass over the model is made twice, from the same random state: the first leaves
nothing but norms, the second steps with the scale that they give.
"""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from veneer.data.example import Example
from veneer.data.pack import Batch
from veneer.errors import TrainingError
from veneer.recipe.settings import Recipe
from veneer.train.checkpoint import TrainState
from veneer.train.loss import backward, backward_below, head_backward, head_of, hidden_states
from veneer.train.optim.step_in_backward import AtOnce
from veneer.train.setup import Job


def step_with(recipe: Recipe, job: Job, state: TrainState, batches: Sequence[Batch]) -> tuple[float, float]:
    """Step with the gradients of a step's batches; returns the summed loss in nats and the gradient's norm.

    Raises TrainingError as `optimizer_step` does.
    """
    at_once = getattr(state.optimizer, "at_once", None)
    if isinstance(at_once, AtOnce):
        return _at_once(recipe, job, state, batches[0], at_once)
    return _kept(recipe, job, state, batches)


def _kept(recipe: Recipe, job: Job, state: TrainState, batches: Sequence[Batch]) -> tuple[float, float]:
    supervised = sum(len(b.targets) for b in batches)
    head, vocab_size, loss = head_of(job.model), job.model.config.get_text_config().vocab_size, 0.0
    state.optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches):
        hidden = hidden_states(job.model, batch, packed=recipe.data.packing)
        part = backward(hidden, batch.targets, head, vocab_size, supervised, recipe.lean)
        del hidden  # its graph, in thousands of small pieces, would lie between the next pass's tensors
        _refuse_loss(part, job, state, number)
        loss += part
    penalty = job.adapter.penalty()
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    _refuse_unreached(job, {n.parameter for n in job.adapter.named() if n.parameter.grad is not None})
    norm = torch.nn.utils.clip_grad_norm_(job.adapter.parameters(), recipe.train.clip or float("inf"))
    _refuse_norm(norm, state)
    state.optimizer.step()
    return loss, float(norm)


def _at_once(recipe: Recipe, job: Job, state: TrainState, batch: Batch, at_once: AtOnce) -> tuple[float, float]:
    scale, devices = None, {p.device for p in at_once.parameters if p.is_cuda}
    if recipe.train.clip:
        with torch.random.fork_rng(list(devices)):
            hidden, rows, _ = _begun(recipe, job, state, batch, at_once)
            with at_once.measuring():
                backward_below(hidden, rows, recipe.lean)
        del hidden, rows
        _refuse_unreached(job, set(at_once.norms))
        norm = _norm(job, at_once)
        _refuse_norm(norm, state)
        scale = (recipe.train.clip / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
    hidden, rows, loss = _begun(recipe, job, state, batch, at_once)
    with at_once.stepping(scale):
        backward_below(hidden, rows, recipe.lean)
    _refuse_unreached(job, set(at_once.norms))
    norm = _norm(job, at_once)
    state.optimizer.step()
    return loss, float(norm)


def _begun(
    recipe: Recipe, job: Job, state: TrainState, batch: Batch, at_once: AtOnce
) -> tuple[Tensor, Tensor | None, float]:
    """Forward pass and the head's backward pass: hidden states, their gradient, and the loss, which is finite."""
    at_once.begin()
    hidden = hidden_states(job.model, batch, packed=recipe.data.packing)
    vocab_size = job.model.config.get_text_config().vocab_size
    head = head_of(job.model)
    loss, rows = head_backward(hidden, batch.targets, head, vocab_size, len(batch.targets), recipe.lean)
    _refuse_loss(loss, job, state, 0)
    return hidden, rows, loss


def _norm(job: Job, at_once: AtOnce) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([at_once.norms[p] for p in job.adapter.parameters()]))
    return norm


def _refuse_loss(loss: float, job: Job, state: TrainState, number: int) -> None:
    """Raise TrainingError if the loss of a step's micro-batch of this number is not finite."""
    if isfinite(loss):
        return
    examples: list[Example] = [job.examples[i] for i in job.plan[state.step][number]]
    rows = ", ".join(f"{e.source}:{e.line}" for e in examples[:8])
    raise TrainingError(
        f"step {state.step + 1}: the loss is {loss}, in a micro-batch of the rows {rows}; look at those rows, or try a "
        "lower optimizer.lr. The last checkpoint is whole."
    )


def _refuse_unreached(job: Job, reached: set[Tensor]) -> None:
    """Raise TrainingError for parameters that the loss does not reach."""
    named = job.adapter.named()
    unreached = [f"{n.path} {n.name}" for n in named if n.parameter not in reached]
    if unreached:
        raise TrainingError(
            f"{len(unreached)} of {len(named)} parameters get no gradient, so they would never change: "
            f"{', '.join(unreached[:4])}; leave those modules out (method.exclude)"
        )


def _refuse_norm(norm: Tensor, state: TrainState) -> None:
    if not isfinite(norm):
        raise TrainingError(f"step {state.step + 1}: the gradient's norm is {float(norm)}; try a lower optimizer.lr")
