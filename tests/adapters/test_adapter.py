"""What every change of a model can do, whichever of the three it is."""

from pathlib import Path

import pytest
import torch

from tests.methods.parity import fresh, logits
from veneer.adapters.adapter import Change
from veneer.adapters.attach import attach
from veneer.adapters.composite import Together
from veneer.adapters.virtual_tokens import attach_prompt
from veneer.methods.base import config_from
from veneer.prompts.base import config_from as prompt_config


def one(kind: str, model: object) -> Change:
    adapter = attach(model, config_from("lora", {"rank": 2, "init": "random", "dropout": 0.5}))  # type: ignore[arg-type]
    if kind == "deltas":
        return adapter
    prompt = attach_prompt(model, prompt_config("prefix", {"tokens": 3}))
    if kind == "both":
        return Together(adapter, prompt)
    adapter.detach()
    return prompt


@pytest.mark.parametrize(("kind", "said"), [("deltas", "lora"), ("prompt", "prefix"), ("both", "lora + prefix")])
def test_its_verbs(tiny_model: Path, kind: str, said: str) -> None:
    model = fresh(tiny_model)
    plain = logits(model)
    change = one(kind, model).eval()
    assert change.kind == said and change.attached and change.attach() is change
    changed = logits(model)
    assert not torch.allclose(changed, plain)
    with change.detached() as base:
        assert base is model and not change.attached
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), changed)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(holder.training for holder in change.train().holders().values())
    inside = [p for holder in change.holders().values() for p in holder.parameters()]
    assert {id(p) for p in change.parameters()} == {id(p) for p in inside}
    assert change.n_params() == sum(p.numel() for p in inside)
    assert {n.place for n in change.named()} == {"deltas": {"layer"}, "prompt": {"prompt"}}.get(
        kind, {"layer", "prompt"}
    )
    assert (change.settings is None) == (kind == "prompt") == (not change.deltas)
    assert change.penalty() is None
    change.stepped_(1, 2)
    change.detach()
    assert torch.equal(logits(model), plain)
    assert all(p.requires_grad for p in model.parameters())


def test_what_changes_an_embedding_is_told_apart(tiny_model: Path) -> None:
    change = attach(fresh(tiny_model), config_from("lora", {"rank": 2}), ("embed_tokens", "q_proj"))
    places = {(n.path.rpartition(".")[2], n.place) for n in change.named()}
    assert places == {("embed_tokens", "embedding"), ("q_proj", "layer")}
