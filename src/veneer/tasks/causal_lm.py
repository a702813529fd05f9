"""Predict the next token: completions of prompts, answers of chats, running text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.base.base import Base
from veneer.data.example import Example
from veneer.data.pack import Batch, collate
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.errors import ModelError
from veneer.models.blocks import attends_ahead
from veneer.tasks.base import TASKS, Loss, Task
from veneer.tasks.lm_loss import backward_below, head_backward, hidden_states, summed_loss
from veneer.tasks.loss_selftest import check_fast_paths

ROUND = 64
"""Packed micro-batches are filled up to a multiple of this many tokens in training."""


@TASKS.add("causal-lm")
class CausalLM(Task):
    """The head is the network's own, from hidden states to the vocabulary."""

    metrics = ("loss", "perplexity", "exact_match")

    def refuse_base(self, base: Base, what: str) -> None:
        ahead = attends_ahead(base.network)
        if base.head_path is not None and not ahead:
            return
        why = "its attention sees later tokens" if ahead else "it has no output head"
        raise ModelError(
            f"{what} cannot be trained on {base.name}: {base.kind} is an encoder ({why}), and training teaches the "
            "next token. Nothing was loaded; give a causal language model (model: ...)"
        )

    def renderer(self, tokenizer: Any, settings: DataSettings, max_length: int) -> Renderer:
        return Renderer(tokenizer, settings, max_length)

    def batch(self, examples: Sequence[Example], base: Base, *, rounded: bool = False) -> Batch:
        return collate(examples, ROUND if rounded else 1).to(base.device.torch_device)

    def forward(self, base: Base, batch: Batch, *, packed: bool) -> Tensor:
        return hidden_states(base, batch, packed=packed)

    def loss(self, base: Base, batch: Batch, divisor: int, *, packed: bool, lean: bool = False) -> Loss:
        hidden = self.forward(base, batch, packed=packed)
        value, gradient = head_backward(base, hidden, batch.targets, divisor, lean=lean)
        return Loss(value, lambda: backward_below(base, hidden, gradient, lean=lean))

    @torch.no_grad()
    def summed_loss(self, base: Base, batch: Batch, *, packed: bool) -> Tensor:
        return summed_loss(base, hidden_states(base, batch, packed=packed), batch.targets)

    def selftest(self, base: Base, examples: Sequence[Example], *, packed: bool) -> None:
        check_fast_paths(base, examples, packed=packed)
