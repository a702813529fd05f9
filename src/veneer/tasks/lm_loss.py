"""The loss at supervised positions only, its head in chunks: logits of prompts or of whole batches never exist.

The backward pass goes in two stages.  Each chunk of the head is differentiated at once, which leaves the gradient of
the hidden states; the transformer below is differentiated from there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.base.base import Base
from veneer.data.pack import Batch
from veneer.models.attention import AttentionContext, Documents, check_packable

CHUNK_BYTES = 2**26
"""Most memory for one chunk's logits and their gradient."""
CHUNK_BYTES_ACCELERATOR = 2**30
"""The same on an accelerator, where many small chunks cost more than the memory."""

Head = Callable[[Tensor], Tensor]


def hidden_states(base: Base, batch: Batch, *, packed: bool) -> Tensor:
    """The last hidden states (M, D) at the batch's M supervised positions.

    packed    attention within documents; otherwise the batch is one document, with the network's own attention
    """
    more: dict[str, Any] = {}
    if packed:
        check_packable(base.network)
        documents = Documents.from_starts(batch.starts).to(batch.input_ids.device)
        more = AttentionContext(documents).arguments()
    if packed or base.accepts("position_ids"):
        more["position_ids"] = batch.position_ids
    output = base.transformer(input_ids=batch.input_ids, use_cache=False, **more)
    hidden: Tensor = output.last_hidden_state
    return hidden[0].index_select(0, batch.supervised)


def head_of(base: Base) -> Head:
    """Hidden states (M, D) -> logits (M, V) as the network itself makes them, with its scaling and capping."""
    linear, scale, cap = base.head, base.logit_scale, base.logit_cap

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = linear(hidden)
        if scale != 1:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def summed_loss(base: Base, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood of targets (M,) under hidden (M, D), summed, in nats; no gradient is kept."""
    head = head_of(base)
    with torch.no_grad():
        return sum((_nll(h, t, head) for h, t in _chunks(base, hidden, targets)), torch.zeros((), device=hidden.device))


def backward(base: Base, hidden: Tensor, targets: Tensor, divisor: int, *, lean: bool = False) -> float:
    """Accumulate gradients of the summed loss / divisor; returns the summed loss in nats.

    lean    return freed memory to the system after each pass, since its pieces would add to the next one's peak: a
            tenth of a process less, for a third more time of a 135M model's step
    """
    total, rows = head_backward(base, hidden, targets, divisor, lean=lean)
    backward_below(base, hidden, rows, lean=lean)
    return total


def head_backward(
    base: Base, hidden: Tensor, targets: Tensor, divisor: int, *, lean: bool = False
) -> tuple[float, Tensor | None]:
    """The first stage: gradients of the head, the summed loss in nats, and hidden's gradient if it needs one."""
    if lean:
        base.device.trim()
    head, rows, total = head_of(base), hidden.detach().requires_grad_(), 0.0
    for h, t in _chunks(base, rows, targets):
        loss = _nll(h, t, head)
        (loss / divisor).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    if lean:
        base.device.trim()
    return total, rows.grad if hidden.requires_grad and len(targets) else None


def backward_below(base: Base, hidden: Tensor, gradient: Tensor | None, *, lean: bool = False) -> None:
    """The second stage: gradients of everything that `hidden` was computed from."""
    if gradient is not None:
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
    if lean:
        base.device.trim()


def _nll(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def chunk_rows(base: Base) -> int:
    """Rows of hidden states whose logits exist at a time."""
    return max(16, (CHUNK_BYTES_ACCELERATOR if base.device.is_accelerator else CHUNK_BYTES) // (10 * base.vocab_size))


def _chunks(base: Base, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = chunk_rows(base)
    return [(hidden[i : i + rows], targets[i : i + rows]) for i in range(0, len(targets), rows)]
