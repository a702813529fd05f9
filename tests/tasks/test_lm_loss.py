"""The loss in chunks and two stages, against plain autograd through the model's own logits."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from veneer import machine
from veneer.adapters.attach import attach
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.data.example import Example
from veneer.data.pack import Batch, collate
from veneer.methods.base import config_from
from veneer.models.attention import use_veneer_attention
from veneer.models.skeleton import load_tokenizer
from veneer.tasks import lm_loss as module
from veneer.tasks.lm_loss import backward, head_of, hidden_states, summed_loss

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def made(config: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    use_veneer_attention(model)
    return model


def adapted(model: Any, targets: Any = "all-linear", *, dtype: torch.dtype = torch.float32) -> Any:
    adapter = attach(model, config_from("lora", {"rank": 2, "init": "random"}), targets).eval()
    for delta in adapter.deltas.values():
        delta.to(dtype)
    return adapter


def example(length: int, seed: int, prompt: int = 0) -> Example:
    tokens = np.random.default_rng(seed).integers(0, 64, length).astype(np.int32)
    return Example(tokens, np.arange(length) > prompt, "rows.jsonl", seed)


def plain_loss(model: Any, examples: list[Example]) -> Tensor:
    """Each document alone through model(...).logits; positions found one by one."""
    total = torch.zeros(())
    for e in examples:
        logits = model(input_ids=torch.from_numpy(e.tokens.astype(np.int64))[None]).logits[0]
        for at in range(1, len(e)):
            if e.supervised[at]:
                total = total + F.cross_entropy(logits[at - 1].float(), torch.tensor(int(e.tokens[at])))
    return total


def trained(model: Any, batch: Batch, divisor: int, *, packed: bool = True, lean: bool = False) -> float:
    """The summed loss of a batch, its gradients accumulated."""
    base = Base(model)
    return backward(base, hidden_states(base, batch, packed=packed), batch.targets, divisor, lean=lean)


def gradients(adapter: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    return found


def close(ours: list[Tensor], theirs: list[Tensor], relative: float = 1e-5) -> bool:
    largest = max(float(b.abs().max()) for b in theirs)
    return all((a - b).abs().max() <= relative * largest for a, b in zip(ours, theirs, strict=True))


LLAMA = made(LlamaConfig(**SHAPE))
LORA = adapted(LLAMA)
DOUBLE = made(LlamaConfig(**SHAPE), dtype=torch.float64)
LORA_OF_DOUBLE = adapted(DOUBLE, dtype=torch.float64)
OTHERS = {
    "gemma2 (caps logits)": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0),
    "granite (divides logits)": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "cohere (multiplies logits)": CohereConfig(**SHAPE, logit_scale=0.25),
}


SHAPES = st.lists(st.tuples(st.integers(2, 14), st.integers(0, 5)), min_size=1, max_size=5)


def examples_of(shapes: list[tuple[int, int]]) -> list[Example]:
    return [example(n, i, min(prompt, n - 2)) for i, (n, prompt) in enumerate(shapes)]


@settings(deadline=None, max_examples=20)
@given(SHAPES)
def test_the_packed_loss_is_that_of_one_document_at_a_time(shapes: list[tuple[int, int]]) -> None:
    examples = examples_of(shapes)
    batch = collate(examples)
    ours = trained(LLAMA, batch, 7)
    gradients(LORA)
    assert ours == pytest.approx(plain_loss(LLAMA, examples).item(), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(SHAPES)
def test_the_packed_gradient_is_that_of_one_document_at_a_time(shapes: list[tuple[int, int]]) -> None:
    """In float64: in float32 both ways are 1e-4 from it, each by its own rounding."""
    examples = examples_of(shapes)
    batch = collate(examples)
    trained(DOUBLE, batch, 7)
    packed = gradients(LORA_OF_DOUBLE)
    (plain_loss(DOUBLE, examples) / 7).backward()
    assert close(packed, gradients(LORA_OF_DOUBLE), 1e-9)


def test_each_document_of_a_pack_has_its_own_loss() -> None:
    examples = [example(n, n) for n in (9, 2, 30, 4)]
    batch = collate(examples)
    with torch.no_grad():
        hidden = hidden_states(Base(LLAMA), batch, packed=True)
        losses = F.cross_entropy(head_of(Base(LLAMA))(hidden), batch.targets, reduction="none")
        for e, part in zip(examples, losses.split([len(e) - 1 for e in examples]), strict=True):
            assert part.sum().item() == pytest.approx(plain_loss(LLAMA, [e]).item(), rel=1e-5)


def test_one_document_by_the_models_own_attention_is_the_same() -> None:
    batch = collate([example(20, 0, 4)])
    a, b = (trained(LLAMA, batch, 1, packed=p) for p in (True, False))
    gradients(LORA)
    assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("rows", [16, 17, 40, 1000])
def test_chunking_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate([example(60, 0), example(41, 1)])
    whole = trained(LLAMA, batch, 1)
    expected = gradients(LORA)
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * 10 * 64)
    chunks = module._chunks(Base(LLAMA), torch.zeros(99, 32), batch.targets)
    assert [len(t) for _, t in chunks] == [min(rows, 99 - i) for i in range(0, 99, rows)]
    hidden = hidden_states(Base(LLAMA), batch, packed=True)
    assert backward(Base(LLAMA), hidden, batch.targets, 1) == pytest.approx(whole, rel=1e-6)
    assert close(gradients(LORA), expected)
    assert float(summed_loss(Base(LLAMA), hidden, batch.targets)) == pytest.approx(whole, rel=1e-6)


def test_logits_of_prompts_are_never_made() -> None:
    batch = collate([example(50, 0, prompt=45)])
    rows: list[int] = []
    hook = LLAMA.lm_head.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    trained(LLAMA, batch, 1)
    hook.remove()
    gradients(LORA)
    assert rows == [4]


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_heads_that_scale_or_cap_are_the_models_own(config: Any) -> None:
    model = made(config)
    batch = collate([example(20, 0)])
    hidden = hidden_states(Base(model), batch, packed=False)
    own = model(input_ids=batch.input_ids).logits[0, :-1]
    assert torch.allclose(head_of(Base(model))(hidden), own, atol=1e-6)
    assert not torch.allclose(model.get_output_embeddings()(hidden), own, atol=1e-2)  # so there was something to do


def test_an_adapter_on_the_head_alone_gets_its_gradient() -> None:
    model = made(LlamaConfig(**SHAPE))
    adapter, examples = adapted(model, ("lm_head",)), [example(9, 0), example(5, 1)]
    batch = collate(examples)
    trained(model, batch, 2)
    ours = gradients(adapter)
    (plain_loss(model, examples) / 2).backward()
    assert close(ours, gradients(adapter))


@pytest.mark.model
def test_the_real_model_packed_has_the_losses_of_its_documents_alone(smollm2: Any) -> None:
    model = load_model(smollm2, dtype="float32").network
    texts = [
        "The capital of France is Paris.",
        "SELECT name FROM customers WHERE city = 'Oslo'",
        "One, two, three, four",
    ]
    tokenizer = load_tokenizer(smollm2)
    tokens = [np.array(tokenizer(t).input_ids, dtype=np.int32) for t in texts]
    examples = [Example(t, np.arange(len(t)) > 0, "x", i) for i, t in enumerate(tokens)]
    batch = collate(examples, 64)
    with torch.no_grad():
        hidden = hidden_states(Base(model), batch, packed=True)
        losses = F.cross_entropy(head_of(Base(model))(hidden), batch.targets, reduction="none")
        for e, part in zip(examples, losses.split([len(e) - 1 for e in examples]), strict=True):
            assert part.sum().item() == pytest.approx(plain_loss(model, [e]).item(), rel=1e-5)


def test_filling_up_to_a_round_number_changes_nothing() -> None:
    """What is filled up is a document of its own, which nothing is learned from and nothing attends to."""
    examples = [example(12, 0), example(7, 1)]
    plain, filled = collate(examples), collate(examples, 64)
    assert filled.input_ids.shape == (1, 64)
    losses = []
    for batch in (plain, filled):
        losses.append(trained(DOUBLE, batch, 3))
        losses.append(gradients(LORA_OF_DOUBLE))
    assert losses[0] == pytest.approx(losses[2], rel=1e-7)
    assert close(losses[1], losses[3], 1e-9)


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    batch = collate([example(5, 0, prompt=9)])
    hidden = hidden_states(Base(LLAMA), batch, packed=True)
    assert backward(Base(LLAMA), hidden, batch.targets, 1) == 0.0
    assert float(summed_loss(Base(LLAMA), hidden, batch.targets)) == 0.0


@pytest.mark.parametrize(("lean", "times"), [(True, 3), (False, 0)])
def test_freed_memory_goes_back_after_each_pass_only_where_memory_comes_first(
    lean: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(machine, "trim_memory", lambda: calls.append(1))
    batch = collate(examples_of([(9, 3), (5, 2)]))
    trained(LLAMA, batch, 7, lean=lean)
    assert len(calls) == times
