"""A model reduced to what changes while only its upper blocks learn: a fraction of the cost, the same numbers.

What the first trained block reads is computed once for each example. The output head keeps only the words that occur in
the examples: on SmolLM2 it is otherwise as much work as eight blocks.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from veneer.data.example import Example
from veneer.train.setup import Training

States = dict[tuple[int, ...], Tensor]
"""What the first computed block reads, (T, D), by an example's tokens."""


def shorten_(training: Training, first: int) -> Training:
    """Let the base begin at block `first` and choose among the words of the job's examples only.

    The examples' tokens are numbered anew; the model then knows no others, and its block 0 is what was block `first`.
    Hidden states stay what they were; the loss is over fewer words, so a little lower.
    """
    job, network = training.job, training.base.network
    base = network.base_model
    inputs = _inputs_of(base, first, [*job.examples, *job.held_out])
    words = np.unique(np.concatenate([e.tokens for e in [*job.examples, *job.held_out]]))
    examples, held_out = ([_renumbered(e, words) for e in rows] for rows in (job.examples, job.held_out))
    states = dict(zip((tuple(e.tokens.tolist()) for e in [*examples, *held_out]), inputs, strict=True))
    network.set_output_embeddings(_head_of_words(network.get_output_embeddings().weight, words))
    base.layers = base.layers[first:]
    base.register_forward_pre_hook(lambda _, args, kwargs: (args, _with_states(kwargs, states)), with_kwargs=True)
    return Training(replace(job, examples=examples, held_out=held_out), replace(training.base), training.adapter)


def _inputs_of(base: Any, first: int, examples: list[Example]) -> list[Tensor]:
    """What block `first` reads for each example, (T, D)."""
    seen: list[Tensor] = []
    hook = base.layers[first].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    with torch.no_grad():
        for example in examples:
            base(input_ids=torch.from_numpy(example.tokens.astype(np.int64))[None], use_cache=False)
    hook.remove()
    return seen


def _renumbered(e: Example, words: Any) -> Example:
    return Example(np.searchsorted(words, e.tokens).astype(np.int32), e.supervised, e.source, e.line)


def _head_of_words(weight: Tensor, words: Any) -> nn.Linear:
    head = nn.Linear(weight.shape[1], len(words), bias=False, dtype=weight.dtype)
    head.weight = nn.Parameter(weight[torch.from_numpy(words).long()].detach().clone(), requires_grad=False)
    return head


def _with_states(kwargs: dict[str, Any], states: States) -> dict[str, Any]:
    """A forward pass's arguments with hidden states in the tokens' place."""
    ids, positions = kwargs["input_ids"][0], kwargs["position_ids"][0]
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
    embeds = torch.cat([_state(ids[a:b], states) for a, b in pairwise(starts)])
    return {**{k: v for k, v in kwargs.items() if k != "input_ids"}, "inputs_embeds": embeds[None]}


def _state(ids: Tensor, states: States) -> Tensor:
    """An example's state; zeros for the padding that `collate` ends with."""
    state = states.get(tuple(ids.tolist()))
    if state is None and not ids.any():
        some = next(iter(states.values()))
        state = some.new_zeros(len(ids), some.shape[1])
    if state is None:
        raise KeyError(f"{len(ids)} tokens of none of the job's examples")
    return state
