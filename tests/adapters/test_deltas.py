"""Deltas on modules: hooks that run wherever the module is called, and gradients that reach them alone."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tests.adapters.shaken import X, shake, shown
from tests.golden.toys import llama, outputs
from veneer.adapters.attach import attach
from veneer.methods.lora import LoRAConfig


def test_only_the_deltas_are_trained_and_each_is_named_with_its_role() -> None:
    model = llama()
    adapter = attach(model, LoRAConfig(rank=2), ("q_proj", "embed_tokens"))
    assert not any(p.requires_grad for p in model.parameters())
    named = adapter.named()
    assert [(n.path, n.name, n.role) for n in named[:4]] == [
        ("model.embed_tokens", "a", "in"),
        ("model.embed_tokens", "b", "out"),
        ("model.layers.0.self_attn.q_proj", "a", "in"),
        ("model.layers.0.self_attn.q_proj", "b", "out"),
    ]
    assert adapter.n_params() == 2 * (24 + 16) + 3 * 2 * (16 + 16) == sum(p.numel() for p in adapter.parameters())
    shake(adapter)
    outputs(model, X).square().mean().backward()
    assert all(n.parameter.grad is not None and n.parameter.grad.abs().sum() > 0 for n in named)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_pass_through_checkpointing() -> None:
    grads = []
    for again in (False, True):
        model = llama()
        adapter = shake(attach(model, LoRAConfig(rank=2)))
        y = checkpoint(outputs, model, X, use_reentrant=False) if again else outputs(model, X)
        y.square().mean().backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_layer_called_by_keyword_is_changed_too() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), Conv1D(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(x=self.one(input=x))
            return y

    model, x = Caller(), torch.ones(2, 3)
    shake(attach(model, LoRAConfig(rank=1), ("one", "two")))
    by_position = model.two(model.one(x))
    assert torch.equal(model(x), by_position)


def test_a_tied_embedding_and_head_have_deltas_of_their_own() -> None:
    model = llama()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter = shake(attach(model, LoRAConfig(rank=2), ("embed_tokens", "lm_head")))
    assert list(adapter.deltas) == ["model.embed_tokens", "lm_head"]
    assert adapter.deltas["lm_head"].a.shape == (2, 16)
    assert adapter.deltas["model.embed_tokens"].a.shape == (2, 24)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    there = shown(model)
    with torch.no_grad():
        adapter.deltas["lm_head"].b.zero_()
    assert not torch.allclose(shown(model), there, atol=1e-2)


def test_under_a_bfloat16_model_parameters_and_their_gradients_stay_float32() -> None:
    model = llama().bfloat16()
    adapter = shake(attach(model, LoRAConfig(rank=2), ("q_proj", "embed_tokens", "lm_head")))
    assert shown(model).dtype == torch.bfloat16
    outputs(model, X).float().square().mean().backward()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in adapter.parameters() if p.grad is not None} == {torch.float32}


def test_dropout_is_turned_on_and_off_with_the_adapter() -> None:
    model = llama()
    adapter = attach(model, LoRAConfig(rank=2, dropout=0.5, init="random"))
    assert not torch.equal(shown(model), shown(model))
    assert torch.equal(shown(adapter.eval().model), shown(model))
    assert not torch.equal(shown(adapter.train().model), shown(model))


def test_what_changes_an_embedding_is_told_apart() -> None:
    change = attach(llama(), LoRAConfig(rank=2), ("embed_tokens", "q_proj"))
    places = {(n.path.rpartition(".")[2], n.place) for n in change.named()}
    assert places == {("embed_tokens", "embedding"), ("q_proj", "layer")}
