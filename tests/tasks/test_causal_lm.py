"""The task against what it promises: rounded batches on the base's device, and gradients of the summed loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertModel

from tests.tasks.test_base import made_examples
from veneer.adapters.attach import attach
from veneer.base.base import Base
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.errors import ModelError
from veneer.methods.base import config_from
from veneer.models.attention import use_veneer_attention
from veneer.tasks.causal_lm import ROUND, CausalLM

BERT = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


@pytest.fixture
def base(tiny_model: Path) -> Base:
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    use_veneer_attention(network)
    return Base.of(network)


def test_batches_are_rounded_for_training_alone(base: Base) -> None:
    examples = made_examples(3)
    plain, rounded = (CausalLM().batch(examples, base, rounded=r) for r in (False, True))
    assert plain.input_ids.shape[1] == sum(map(len, examples))
    assert rounded.input_ids.shape[1] % ROUND == 0
    assert torch.equal(plain.targets, rounded.targets)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_comes_before_the_backward_pass_and_its_gradient_is_autograds(base: Base, packed: bool) -> None:
    adapter = attach(base.network, config_from("lora", {"rank": 2, "init": "random"})).eval()
    examples = made_examples(4 if packed else 1)
    batch = CausalLM().batch(examples, base)
    loss = CausalLM().loss(base, batch, 5, packed=packed)
    assert all(p.grad is None for p in adapter.parameters())
    loss.backward()
    ours = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    total: Any = torch.zeros(())
    for e in examples:
        ids, mask = torch.from_numpy(e.tokens).long(), torch.from_numpy(e.supervised)[1:]
        logits = base.network(input_ids=ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits[mask], ids[1:][mask], reduction="sum")
    assert loss.value == pytest.approx(total.item(), rel=1e-5)
    assert float(CausalLM().summed_loss(base, batch, packed=packed)) == pytest.approx(total.item(), rel=1e-5)
    theirs = torch.autograd.grad(total / 5, adapter.parameters())
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    ("network", "why"),
    [(BertModel(BERT), "its attention sees later tokens"), (BertForMaskedLM(BERT), "its attention sees later tokens")],
)
def test_encoders_are_refused(network: Any, why: str) -> None:
    with pytest.raises(ModelError, match=rf"method lora cannot be trained on bert: Bert.* is an encoder \({why}\)"):
        CausalLM().refuse_base(Base.of(network, name="bert"), "method lora")


def test_a_causal_language_model_is_taken(base: Base) -> None:
    CausalLM().refuse_base(base, "method lora")


def test_rows_become_examples_by_the_renderer(base: Base, tiny_model: Path) -> None:
    from veneer.models.skeleton import load_tokenizer

    renderer = CausalLM().renderer(load_tokenizer(tiny_model), DataSettings(train="rows.jsonl"), 64)
    assert isinstance(renderer, Renderer) and renderer.max_length == 64
