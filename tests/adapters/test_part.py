"""What every part of an adapter does, by itself."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.methods.layers import moved
from tests.methods.parity import fresh, logits
from veneer.adapters.attach import attach
from veneer.adapters.part import PREFIX, NamedParameter
from veneer.methods.base import config_from
from veneer.prompts.base import config_from as prompt_config

KINDS = ["deltas", "trained modules", "trained tokens", "virtual tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_changes_the_outputs_only_while_it_is_attached(tiny_model: Path, kind: str) -> None:
    model = fresh(tiny_model)
    plain = logits(model)
    more = {"trained modules": {"trained_modules": ["norm"]}, "trained tokens": {"trained_tokens": [5, 7]}}
    prompt = prompt_config("prompt", {"tokens": 3})
    config = None if kind == "virtual tokens" else config_from("lora", {"rank": 2})
    adapter = attach(model, config, prompt=None if config else prompt, **more.get(kind, {})).eval()  # type: ignore[arg-type]
    part = adapter.parts[-1]
    for holder in part.holders().values():
        moved(holder, 0.2)  # type: ignore[arg-type]
    changed = logits(model)
    assert part.attached and not torch.equal(changed, plain)
    part.detach()
    part.detach()
    assert not part.attached and torch.equal(logits(model), plain)
    part.attach()
    assert torch.equal(logits(model), changed)
    assert all(n.parameter is p for n, p in zip(reversed(part.named()), reversed(adapter.parameters()), strict=False))
    assert all(key.startswith(PREFIX) == (kind != "virtual tokens") for key in part.tensors())


def test_a_parameter_is_on_a_layer_unless_it_says_otherwise() -> None:
    assert NamedParameter("a", "b", "in", nn.Parameter(torch.zeros(1))).place == "layer"
