"""Attention within documents, against a softmax in NumPy and against the model itself, one document at a time."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from veneer.errors import ModelError
from veneer.models.attention import (
    BLOCK,
    NAME,
    AttentionContext,
    Documents,
    causal_attention,
    check_packable,
    use_veneer_attention,
)

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def made(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    use_veneer_attention(model)
    return model


GPT2 = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)


def type_of(config: Any) -> str:
    return str(config.model_type)


LLAMA = made(LlamaConfig(**SHAPE))
MISTRAL = made(MistralConfig(**SHAPE, sliding_window=5))


def tokens_of(length: int, seed: int) -> Tensor:
    return torch.randint(40, (length,), generator=torch.Generator().manual_seed(seed))


def packed(model: Any, documents: list[Tensor]) -> Tensor:
    lengths = torch.tensor([len(d) for d in documents])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    more = AttentionContext(Documents.from_starts(starts)).arguments()
    return model(input_ids=torch.cat(documents)[None], position_ids=positions[None], use_cache=False, **more).logits[0]


def alone(model: Any, documents: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=d[None]).logits[0] for d in documents])


def softmax_attention(q: Any, k: Any, v: Any, scale: float, window: int | None) -> Any:
    """One query at a time, float64: what the formula says, for (S, H, T, E) and (S, K, T, E)."""
    s, h, t, _ = q.shape
    out = np.zeros((s, h, t, v.shape[-1]))
    for b in range(s):
        for head in range(h):
            other = head * k.shape[1] // h
            for row in range(t):
                first = 0 if window is None else max(0, row - window + 1)
                scores = k[b, other, first : row + 1] @ q[b, head, row] * scale
                weights = np.exp(scores - scores.max())
                out[b, head, row] = weights / weights.sum() @ v[b, other, first : row + 1]
    return out


@pytest.mark.parametrize(("h", "k"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("t", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("window", [None, 1, 5, BLOCK, BLOCK + 7])
def test_causal_attention_is_the_softmax(h: int, k: int, t: int, window: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(2, heads, t, 4, generator=g, dtype=torch.float64) for heads in (h, k, k))
    want = softmax_attention(q.numpy(), key.numpy(), v.numpy(), 0.7, window)
    assert np.abs(causal_attention(q, key, v, 0.7, window).numpy() - want).max() < 1e-12


def test_values_may_be_wider_than_keys() -> None:
    g = torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(1, 2, 5, e, generator=g, dtype=torch.float64) for e in (4, 4, 6))
    want = softmax_attention(q.numpy(), key.numpy(), v.numpy(), 0.5, None)
    assert np.abs(causal_attention(q, key, v, 0.5).numpy() - want).max() < 1e-12


@pytest.mark.parametrize("model", [LLAMA, MISTRAL], ids=["llama", "mistral-window-5"])
@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS)
def test_packed_documents_are_as_alone(model: Any, lengths: list[int]) -> None:
    documents = [tokens_of(n, i) for i, n in enumerate(lengths)]
    with torch.no_grad():
        assert torch.allclose(packed(model, documents), alone(model, documents), atol=1e-5)


@pytest.mark.parametrize("model", [LLAMA, MISTRAL], ids=["llama", "mistral-window-5"])
def test_documents_longer_than_a_block_are_as_alone(model: Any) -> None:
    documents = [tokens_of(n, n) for n in (2 * BLOCK + 9, 3, BLOCK, BLOCK + 1)]
    with torch.no_grad():
        assert torch.allclose(packed(model, documents), alone(model, documents), atol=1e-5)


@pytest.mark.parametrize("model", [LLAMA, MISTRAL], ids=["llama", "mistral-window-5"])
def test_gradients_are_as_alone(model: Any) -> None:
    documents = [tokens_of(n, n) for n in (9, 1, 17, 4)]
    embeddings, norm = model.get_input_embeddings().weight, model.model.layers[0].self_attn.k_proj.weight
    found = []
    for logits in (packed(model, documents), alone(model, documents)):
        weighted = logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)
        found.append(torch.autograd.grad(weighted.sum(), [embeddings, norm]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))


def test_a_changed_document_leaves_the_others_bit_identical() -> None:
    documents = [tokens_of(n, n) for n in (9, 5, 14)]
    changed = [documents[0], (documents[1] + 1) % 40, documents[2]]
    with torch.no_grad():
        before, after = packed(LLAMA, documents), packed(LLAMA, changed)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[14:], after[14:])
    assert not torch.allclose(before[9:14], after[9:14], atol=0.1)


def test_gradients_do_not_leak_between_documents_either() -> None:
    documents = [tokens_of(n, n) for n in (9, 5, 14)]
    embedded = LLAMA.get_input_embeddings()(torch.cat(documents)[None]).detach().requires_grad_()
    starts = torch.tensor([0, 9, 14, 28])
    positions = torch.cat([torch.arange(n) for n in (9, 5, 14)])[None]
    more = AttentionContext(Documents.from_starts(starts)).arguments()
    out = LLAMA(inputs_embeds=embedded, position_ids=positions, use_cache=False, **more).logits
    out[0, 9:14].sum().backward()
    assert torch.count_nonzero(embedded.grad[0, :9]) == 0 == torch.count_nonzero(embedded.grad[0, 14:])
    assert torch.count_nonzero(embedded.grad[0, 9:14]) > 0


def test_where_tokens_lie() -> None:
    documents = Documents.from_starts(torch.tensor([0, 2, 3, 6]))
    assert (documents.count, documents.longest) == (3, 3)
    assert documents.take.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 5]  # the last token is repeated behind a document's end
    assert documents.real.tolist() == [True, True, False, True, False, False, True, True, True]
    assert documents.put.tolist() == [0, 1, 3, 6, 7, 8]


def test_padding_gives_and_takes_no_gradient() -> None:
    from veneer.models.attention import _Gather, _Spread

    documents = Documents.from_starts(torch.tensor([0, 2, 3]))  # the second is padded by one place
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    spread = _Spread.apply(x, documents)
    (spread * torch.tensor([1.0, 1, 1, 100])[:, None]).sum().backward()
    assert x.grad.tolist() == [[1, 1], [1, 1], [1, 1]]  # 100 stood at a place of padding
    y = torch.arange(8.0).view(4, 2).requires_grad_()
    _Gather.apply(y, documents).sum().backward()
    assert y.grad.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


def twins(config: Any) -> tuple[Any, Any]:
    """The same model with veneer's attention and with sdpa."""
    ours = made(config)
    assert ours.config._attn_implementation.startswith("veneer")
    plain = copy.deepcopy(ours)
    plain.config._attn_implementation = "sdpa"
    return ours, plain


@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=5), GPT2], ids=type_of)
def test_without_a_context_it_is_sdpa_bit_for_bit(config: Any) -> None:
    """Packed by restarting positions, padded, padded and generated with a cache: as transformers' own sdpa."""
    ours, plain = twins(config)
    ids = torch.stack([tokens_of(12, 0), tokens_of(12, 1)])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    restarting = torch.cat([torch.arange(5), torch.arange(7)])[None]
    for more in ({}, {"attention_mask": mask}, {"position_ids": restarting, "use_cache": False}):
        with torch.no_grad():
            assert torch.equal(ours(ids, **more).logits, plain(ids, **more).logits)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), plain.generate(ids, **settings))
    found = [
        torch.autograd.grad(m(ids).logits.square().mean(), m.get_input_embeddings().weight)[0] for m in (ours, plain)
    ]
    assert torch.equal(*found)


def test_an_architecture_that_asks_for_the_name_takes_the_way_of_sdpa() -> None:
    """Gemma 4 drops queries before its last layers unless its attention is named "sdpa"."""
    shared = Gemma4TextConfig(
        **SHAPE | {"num_hidden_layers": 3},
        head_dim=8,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_kv_shared_layers=1,
        vocab_size_per_layer_input=40,
        hidden_size_per_layer_input=8,
        sliding_window=16,
    )
    ours, plain = twins(shared)
    ids = tokens_of(9, 0)[None]
    with torch.no_grad():
        want = plain(ids, logits_to_keep=3).logits
        assert torch.equal(ours(ids, logits_to_keep=3).logits, want)
        documents = [tokens_of(n, n) for n in (9, 5, 14)]
        assert torch.allclose(packed(ours, documents), alone(plain, documents), atol=1e-5)


def test_packed_documents_take_no_mask_of_n_by_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "veneer", None)  # nothing asks for a mask
    packed(LLAMA, [tokens_of(n, n) for n in (9, 5)])
    with pytest.raises(TypeError):
        LLAMA(tokens_of(9, 0)[None])


def test_the_network_is_prepared_once_and_only_from_sdpa() -> None:
    with torch.random.fork_rng():
        eager = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation="eager")
        falcon = AutoModelForCausalLM.from_config(
            FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        )
        plain = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    for model, other in ((eager, "attention 'eager'"), (falcon, "an attention of its own")):
        before = model.config._attn_implementation
        use_veneer_attention(model)
        assert type(model.config._attn_implementation) is str
        assert model.config._attn_implementation == before
        with pytest.raises(ModelError, match=rf"has {other}, but .* 'sdpa'; set data.packing to false"):
            check_packable(model)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is not prepared for .* call .*use_veneer_attention"):
        check_packable(plain)
    for _ in range(2):
        use_veneer_attention(plain)
        assert plain.config._attn_implementation is NAME
    check_packable(plain)
    assert "attn_implementation" not in plain.config.to_json_string()


def test_a_model_that_passes_no_context_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LLAMA.model.layers[0].self_attn
    whole = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, attention=None, **k: whole(*a, **k))
    with pytest.raises(ModelError, match=r"passes no documents on.*data.packing to false"):
        packed(LLAMA, [tokens_of(5, 0), tokens_of(4, 1)])


def test_soft_capping_in_attention_is_refused_by_name() -> None:
    gemma = made(Gemma2Config(**SHAPE, head_dim=8))
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM has .*softcap.*data.packing to false"):
        check_packable(gemma)
    gemma.config._attn_implementation = NAME
    with pytest.raises(ModelError, match=r"Gemma2Attention cannot .*softcap.*data.packing to false"):
        packed(gemma, [tokens_of(5, 0), tokens_of(4, 1)])


@pytest.mark.parametrize(
    "config",
    [
        PhimoeConfig(**SHAPE, sliding_window=6, num_local_experts=2),
        Qwen2MoeConfig(
            **SHAPE,
            sliding_window=6,
            use_sliding_window=True,
            max_window_layers=0,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
    ],
    ids=["phimoe", "qwen2-moe"],
)
def test_a_window_that_only_the_mask_knows_is_refused_where_it_would_matter(config: Any) -> None:
    model = made(config)
    documents = [tokens_of(6, 0), tokens_of(4, 1)]
    with torch.no_grad():
        assert torch.allclose(packed(model, documents), alone(model, documents), atol=1e-4)
        with pytest.raises(ModelError, match="sliding_window 6"):
            packed(model, [tokens_of(7, 0), tokens_of(4, 1)])
