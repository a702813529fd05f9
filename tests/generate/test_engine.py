"""Batched generation says what each prompt says alone, and what transformers' own generation says."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from veneer.base.base import Base
from veneer.errors import ConfigError, DataError, ModelError
from veneer.generate.engine import Memory, generate
from veneer.generate.sampler import Sampling

STOP = 2


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def some_prompts(n: int, longest: int = 40, seed: int = 0, beginning: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    start = [rng.randrange(3, 384) for _ in range(beginning)]
    return [start + [rng.randrange(3, 384) for _ in range(rng.randrange(1, longest))] for _ in range(n)]


def by_transformers(model: PreTrainedModel, prompt: list[int], new: int, stop: int = STOP) -> list[int]:
    """The oracle: transformers' own greedy generation of one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def without_cache(model: PreTrainedModel, prompt: list[int], new: int, stop: int = STOP) -> list[int]:
    """The plainest meaning: the whole text computed again for every token."""
    tokens = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("beginning", [0, 12])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batched_is_one_by_one_and_transformers(model: Any, batch_size: int, beginning: int) -> None:
    prompts = some_prompts(12, beginning=beginning)
    expected = [by_transformers(model, p, 20) for p in prompts]
    assert generate(Base.of(model), prompts, max_new_tokens=20, stop_ids=[STOP], batch_size=batch_size) == expected
    assert [generate(Base.of(model), [p], max_new_tokens=20, stop_ids=[STOP])[0] for p in prompts] == expected


def test_rows_that_end_at_different_times_leave_and_others_join(model: Any) -> None:
    """A stop set of a tenth of all words makes rows end after anything from 0 to 30 tokens."""
    prompts = some_prompts(40, seed=1)
    stops = set(range(0, 384, 10))
    free = [without_cache(model, p, 30, stop=-1) for p in prompts]
    expected = [next((t[:i] for i, x in enumerate(t) if x in stops), t) for t in free]
    assert len({len(e) for e in expected}) > 8  # the test is about unequal lengths
    assert generate(Base.of(model), prompts, max_new_tokens=30, stop_ids=stops, batch_size=6) == expected


def small(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
        return GPT2LMHeadModel(config).eval()
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)).eval()
    window = {"sliding_window": 16, "num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
    return MistralForCausalLM(MistralConfig(**shape, **window)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "sliding window"])
def test_other_architectures(kind: str) -> None:
    """Learned positions, ALiBi, and a sliding window shorter than the texts."""
    model = small(kind)
    prompts = some_prompts(9, seed=2, beginning=9)
    expected = [without_cache(model, p, 12) for p in prompts]
    assert generate(Base.of(model), prompts, max_new_tokens=12, stop_ids=[STOP], batch_size=4) == expected


def test_eager_attention_ignores_the_padding_too(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    prompts = some_prompts(8, seed=3)
    expected = [without_cache(model, p, 8) for p in prompts]
    assert generate(Base.of(model), prompts, max_new_tokens=8, stop_ids=[STOP], batch_size=8) == expected


def test_long_prompts_are_computed_in_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.generate.engine.PREFILL_TOKENS", 50)
    prompts = some_prompts(10, seed=4)
    expected = [by_transformers(model, p, 8) for p in prompts]
    assert generate(Base.of(model), prompts, max_new_tokens=8, stop_ids=[STOP], batch_size=8) == expected


def test_sampling_does_not_depend_on_the_batch(model: Any) -> None:
    prompts = some_prompts(10, seed=5)

    def sampled(batch_size: int, seed: int) -> list[list[int]]:
        sampler = Sampling(temperature=0.8, top_p=0.9, seed=seed)
        return generate(
            Base.of(model), prompts, max_new_tokens=15, stop_ids=[STOP], sampler=sampler, batch_size=batch_size
        )

    assert sampled(1, 7) == sampled(4, 7) == sampled(32, 7)
    assert sampled(4, 7) != sampled(4, 8)


def test_callbacks_see_every_token_and_may_end_a_row(model: Any) -> None:
    prompts = some_prompts(7, seed=6)
    seen: dict[int, list[int]] = {i: [] for i in range(7)}
    finished: dict[int, list[int]] = {}

    def on_token(row: int, token: int) -> bool:
        seen[row].append(token)
        return row == 3 and len(seen[3]) == 2

    out = generate(
        Base.of(model),
        prompts,
        max_new_tokens=9,
        stop_ids=[STOP],
        batch_size=3,
        on_token=on_token,
        on_finish=lambda row, tokens: finished.__setitem__(row, list(tokens)),
    )
    assert [seen[i] for i in range(7)] == out
    assert [finished[i] for i in range(7)] == out
    assert out[3] == by_transformers(model, prompts[3], 9)[:2]


def test_memory_gives_the_same_text_and_computes_only_what_is_new(model: Any) -> None:
    memory = Memory()
    first = some_prompts(1, longest=30, seed=7)[0]
    answer = generate(Base.of(model), [first], max_new_tokens=10, stop_ids=[STOP], memory=memory)[0]
    assert memory.tokens[: len(first)] == first and len(memory.tokens) >= len(first) + len(answer) - 1
    second = [*first, *answer, STOP, 50, 60, 70]
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    again = generate(Base.of(model), [second], max_new_tokens=10, stop_ids=[STOP], memory=memory)[0]
    hook.remove()
    assert again == by_transformers(model, second, 10)
    assert lengths[0] == len(second) - len([*first, *answer]) + (0 if len(answer) < 10 else 1)
    edited = [*first[:-1], 99, 98]  # history changed: only the common beginning counts
    assert generate(Base.of(model), [edited], max_new_tokens=10, stop_ids=[STOP], memory=memory)[0] == by_transformers(
        model, edited, 10
    )
    assert generate(Base.of(model), [edited], max_new_tokens=10, stop_ids=[STOP], memory=memory)[0] == by_transformers(
        model, edited, 10
    )


def test_a_memory_that_was_interrupted_is_empty(model: Any) -> None:
    memory = Memory()
    generate(Base.of(model), [[5, 6, 7]], max_new_tokens=3, stop_ids=[], memory=memory)
    assert memory.tokens

    def stop(row: int, token: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(Base.of(model), [[5, 6, 7, 8]], max_new_tokens=3, stop_ids=[], memory=memory, on_token=stop)
    assert memory.tokens == [] and memory.cache is None


def test_modes_are_restored_and_dropout_is_off(model: Any) -> None:
    base = Base.of(model)
    model.train()
    model.model.layers[0].eval()
    try:
        generate(base, [[5, 6]], max_new_tokens=1, stop_ids=[])
        assert model.training and not model.model.layers[0].training and model.lm_head.training
    finally:
        model.eval()


def test_a_row_ends_where_the_positions_end(model: Any) -> None:
    prompt = [7] * 250
    assert len(generate(Base.of(model), [prompt], max_new_tokens=50, stop_ids=[])[0]) == 6  # 256 positions


def test_no_prompts_give_no_texts(model: Any) -> None:
    assert generate(Base.of(model), [], max_new_tokens=5, stop_ids=[]) == []


def test_bad_prompts_are_all_named(model: Any) -> None:
    with pytest.raises(DataError) as caught:
        generate(Base.of(model), [[1], [], [3] * 300], max_new_tokens=5, stop_ids=[])
    assert "prompt 1 is empty" in str(caught.value)
    assert "prompt 2 has 300 tokens, the model has 256 positions" in str(caught.value)


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_counts_below_one(model: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        generate(Base.of(model), [[1]], **({"max_new_tokens": 1, "stop_ids": []} | {name: 0}))


def test_memory_is_for_one_prompt(model: Any) -> None:
    with pytest.raises(ConfigError, match="one conversation, got 2 prompts"):
        generate(Base.of(model), [[1], [2]], max_new_tokens=1, stop_ids=[], memory=Memory())


def test_an_encoder_decoder_is_refused() -> None:
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, **shape))
    with pytest.raises(ModelError, match="T5ForConditionalGeneration cannot generate here"):
        generate(Base.of(model), [[1]], max_new_tokens=1, stop_ids=[])


@pytest.mark.model
def test_smollm2_says_in_a_batch_what_transformers_says_alone(smollm2: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    questions = ["What is the capital of France?", "Count to five.", "Why is the sky blue? Answer in a sentence.", "Hi"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for q in questions
    ]
    expected = [by_transformers(model, p, 24) for p in prompts]
    assert generate(Base.of(model), prompts, max_new_tokens=24, stop_ids=[STOP], batch_size=3) == expected
    assert "Paris" in tokenizer.decode(expected[0])
