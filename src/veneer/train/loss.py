"""The loss at supervised positions only, its head in chunks: logits of prompts or of whole batches never exist.

The backward pass goes in two stages. Each chunk of the head is differentiated at once, which leaves the gradient of
the hidden states; the transformer below is differentiated from there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer import machine
from veneer.data.pack import Batch
from veneer.models.attention import AttentionContext, Documents, check_packable

CHUNK_BYTES = 2**26
"""Most memory for one chunk's logits and their gradient."""

Head = Callable[[Tensor], Tensor]


def hidden_states(model: Any, batch: Batch, *, packed: bool) -> Tensor:
    """The last hidden states (M, D) at the batch's M supervised positions.

    packed    attention within documents; otherwise the batch is one document, with the model's own attention
    """
    more: dict[str, Any] = {}
    if packed:
        check_packable(model)
        documents = Documents.from_starts(batch.starts).to(batch.input_ids.device)
        more = AttentionContext(documents).arguments()
    output = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **more)
    hidden: Tensor = output.last_hidden_state
    return hidden[0].index_select(0, batch.supervised)


def head_of(model: Any) -> Head:
    """Hidden states (M, D) -> logits (M, V) as the model itself makes them, with its scaling and capping."""
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = linear(hidden)
        if scale != 1:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def summed_loss(hidden: Tensor, targets: Tensor, head: Head, vocab_size: int) -> Tensor:
    """Negative log likelihood of targets (M,) under hidden (M, D), summed, in nats; no gradient is kept."""
    with torch.no_grad():
        return sum((_nll(h, t, head) for h, t in _chunks(hidden, targets, vocab_size)), torch.zeros(()))


def backward(hidden: Tensor, targets: Tensor, head: Head, vocab_size: int, divisor: int, lean: bool = False) -> float:
    """Accumulate gradients of the summed loss / divisor; returns the summed loss in nats.

    lean    after each pass, give back what it leaves in the heap in pieces, which would lie under the next one's peak:
            a tenth of a process less, for a third more time of a 135M model's step
    """
    total, rows = head_backward(hidden, targets, head, vocab_size, divisor, lean)
    backward_below(hidden, rows, lean)
    return total


def head_backward(
    hidden: Tensor, targets: Tensor, head: Head, vocab_size: int, divisor: int, lean: bool = False
) -> tuple[float, Tensor | None]:
    """The first stage: gradients of the head, the summed loss in nats, and hidden's gradient if it needs one."""
    if lean:
        machine.trim_memory()
    rows = hidden.detach().requires_grad_()
    total = 0.0
    for h, t in _chunks(rows, targets, vocab_size):
        loss = _nll(h, t, head)
        (loss / divisor).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    if lean:
        machine.trim_memory()
    return total, rows.grad if hidden.requires_grad and len(targets) else None


def backward_below(hidden: Tensor, gradient: Tensor | None, lean: bool = False) -> None:
    """The second stage: gradients of all that `hidden` came from."""
    if gradient is not None:
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
    if lean:
        machine.trim_memory()


def _nll(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def chunk_rows(vocab_size: int) -> int:
    """Rows of hidden states whose logits are there at a time."""
    return max(16, CHUNK_BYTES // (10 * vocab_size))


def _chunks(hidden: Tensor, targets: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    rows = chunk_rows(vocab_size)
    return [(hidden[i : i + rows], targets[i : i + rows]) for i in range(0, len(targets), rows)]
