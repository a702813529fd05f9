"""Prompts against the plain way of doing it: embeddings put before the text, or keys and values before the cache."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, ModernBertDecoderConfig, OPTConfig, StableLmConfig
from transformers.cache_utils import DynamicCache

from tests.methods.layers import moved
from tests.methods.parity import TOKENS, fresh, logits, peft_loads
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach, load_adapter
from veneer.adapters.virtual_tokens import VirtualTokens, shape_of
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.errors import AdapterMismatch, ConfigError, ModelError
from veneer.generate.engine import generate
from veneer.methods.base import config_from
from veneer.models.attention import NAME, AttentionContext, Documents
from veneer.prompts.base import PROMPTS
from veneer.prompts.prefix import PrefixTuningConfig
from veneer.prompts.prompt import PromptTuningConfig
from veneer.train.activation_checkpointing import recomputing

CONFIGS = [PromptTuningConfig(tokens=5), PrefixTuningConfig(tokens=5)]
both = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)


def part(adapter: Adapter) -> VirtualTokens:
    (only,) = adapter.parts
    assert isinstance(only, VirtualTokens)
    return only


def plainly(model: Any, prompted: Adapter, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the tokens as transformers itself gives them with the prompt in front; the prompt is detached."""
    n, b = part(prompted).config.tokens, len(tokens)
    more: dict[str, Any] = {}
    if mask is not None:
        more["attention_mask"] = torch.cat([torch.ones(b, n, dtype=mask.dtype), mask], dim=1)
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + n
    if part(prompted).config.kind == "prompt":
        table = part(prompted).prompt.table()[None].expand(b, -1, -1)
        if mask is not None:
            more["position_ids"] = torch.cat([torch.arange(n).expand(b, -1), more["position_ids"]], dim=1)
        out: Tensor = model(
            inputs_embeds=torch.cat([table, model.get_input_embeddings()(tokens)], dim=1), **more
        ).logits
        return out[:, n:]
    cache = DynamicCache(config=model.config)
    for i, (k, v) in enumerate(part(prompted).prompt.keys_values(lambda x: [])):
        cache.update(k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1), i)
    result = model(input_ids=tokens, past_key_values=cache, **more)
    return torch.as_tensor(result.logits)


def trained(model: Any, config: Any) -> Adapter:
    prompted = attach(model, None, prompt=config)
    moved(part(prompted).prompt, 0.3)  # type: ignore[arg-type]
    return prompted


@both
@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_those_with_the_prompt_in_front(tiny_model: Path, config: Any, padded: bool) -> None:
    model = fresh(tiny_model)
    plain = logits(model)
    prompted = trained(model, config)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]) if padded else None
    more = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    ours = model(TOKENS, **more).logits
    assert ours.shape == plain.shape
    prompted.detach()
    want = plainly(model, prompted, TOKENS, mask)
    real = torch.ones(2, 7, dtype=torch.bool) if mask is None else mask.bool()
    assert float((ours - want)[real].abs().max()) < 1e-4
    assert float((ours - plain)[real].abs().max()) > 0.1
    assert torch.equal(logits(model), plain)


@both
@torch.no_grad()
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantized_embedding_and_head_take_a_prompt(tiny_model: Path, config: Any, storage: str) -> None:
    model = load_model(tiny_model, dtype="float32", storage={"name": storage, "embeddings": True}).network
    prompted = trained(model, config)
    ours = model(TOKENS).logits
    prompted.detach()
    assert float((ours - plainly(model, prompted, TOKENS)).abs().max()) < 1e-4


@both
def test_gradients_are_those_with_the_prompt_in_front(tiny_model: Path, config: Any) -> None:
    model = fresh(tiny_model)
    prompted = trained(model, config)
    table = part(prompted).prompt.table()
    model(TOKENS, use_cache=False).logits.square().mean().backward()
    assert table.grad is not None
    ours, table.grad = table.grad, None
    with recomputing(Base(model), True):
        model(TOKENS, use_cache=False).logits.square().mean().backward()
    assert torch.allclose(table.grad, ours, atol=1e-6)  # type: ignore[arg-type]
    table.grad = None
    prompted.detach()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plainly(model, prompted, TOKENS).square().mean().backward()
    assert torch.allclose(ours, table.grad, atol=1e-5)  # type: ignore[arg-type]
    assert float(ours.abs().max()) > 1e-4


@both
def test_the_engine_generates_with_it(tiny_model: Path, config: Any) -> None:
    """Batched, with a cache and rows of different lengths: as one token at a time in the plain way."""
    model = fresh(tiny_model)
    prompts = [[5, 9, 300], [1, 7, 7, 250, 100, 12], [44]]
    prompted = trained(model, config)
    made = generate(Base.of(model), prompts, max_new_tokens=6, stop_ids=[])
    prompted.detach()
    for prompt, new in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(plainly(model, prompted, torch.tensor([tokens]))[0, -1].argmax()))
        assert new == tokens[len(prompt) :]


@both
def test_packed_documents_each_see_it(tiny_model: Path, config: Any) -> None:
    model = fresh(tiny_model)
    rows = [torch.tensor([[5, 9, 300]]), torch.tensor([[1, 7, 7, 250, 100, 12]]), torch.tensor([[44]])]
    starts = torch.tensor([0, 3, 9, 10])
    positions = torch.cat([torch.arange(r.shape[1]) for r in rows])[None]
    prompted = trained(model, config)
    more = AttentionContext(Documents.from_starts(starts)).arguments()
    hidden = model.base_model(
        input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False, **more
    ).last_hidden_state
    ours = model.lm_head(hidden)
    ours.square().mean().backward()
    grad = part(prompted).prompt.table().grad
    assert grad is not None
    assert torch.count_nonzero(grad) > grad.numel() // 2
    prompted.detach()
    want = torch.cat([plainly(model, prompted, r) for r in rows], dim=1)
    assert torch.allclose(ours, want, atol=1e-4)


@both
def test_with_lora_on_the_same_model(tiny_model: Path, config: Any) -> None:
    model = fresh(tiny_model)
    lora = attach(model, config_from("lora", {"rank": 2})).eval()
    for n, delta in enumerate(lora.deltas.values()):
        moved(delta, 0.2, seed=n)
    prompted = trained(model, config)
    ours = logits(model)
    prompted.detach()
    with torch.no_grad():
        assert float((plainly(model, prompted, TOKENS) - ours).abs().max()) < 1e-4


@both
def test_peft_reads_ours(tiny_model: Path, tmp_path: Path, config: Any) -> None:
    model = fresh(tiny_model)
    trained(model, config).save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = logits(peft_loads(tiny_model, tmp_path / "a"))
    assert float((there[:, -7:] - logits(model)).abs().max()) < 1e-4


@pytest.mark.parametrize("projection", [False, True])
@both
def test_we_read_pefts(tiny_model: Path, tmp_path: Path, config: Any, projection: bool) -> None:
    if config.kind == "prompt" and projection:
        return
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        more = {"prefix_projection": projection, "encoder_hidden_size": 16} if config.kind == "prefix" else {}
        make = peft.PrefixTuningConfig if config.kind == "prefix" else peft.PromptTuningConfig
        theirs = peft.get_peft_model(
            fresh(tiny_model), make(num_virtual_tokens=5, task_type="CAUSAL_LM", **more)
        ).eval()
        there = logits(theirs)
        theirs.save_pretrained(str(tmp_path / "a"))
    model = fresh(tiny_model)
    load_adapter(model, tmp_path / "a")
    assert float((there[:, -7:] - logits(model)).abs().max()) < 1e-4


@both
def test_saved_loaded_and_detached(tiny_model: Path, tmp_path: Path, config: Any) -> None:
    model = fresh(tiny_model)
    plain, state = logits(model), {k: t.clone() for k, t in model.state_dict().items()}
    prompted = trained(model, config)
    want = logits(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert prompted.n_params() == PROMPTS[config.kind].n_params(shape_of(Base(model)), config)
    assert [(n.path, n.role) for n in prompted.named()] == [("prompt", "full")]
    prompted.save(tmp_path / "a")
    prompted.detach()
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation is NAME  # which is sdpa where no prompt is attached
    assert all(torch.equal(model.state_dict()[k], t) for k, t in state.items())
    assert torch.equal(logits(model), plain)
    again = load_adapter(model, tmp_path / "a")
    assert part(again).config == config
    assert torch.equal(logits(model), want)


def test_grouped_heads_and_sizes(tiny_model: Path) -> None:
    shape = shape_of(Base(fresh(tiny_model)))
    assert (shape.width, shape.layers, shape.heads, shape.head_width, shape.vocab_size) == (32, 2, 2, 8, 384)
    assert part(attach(fresh(tiny_model), None, prompt=CONFIGS[1])).prompt.table().shape == (5, 2 * 2 * 2 * 8)


@both
def test_it_starts_as_words_in_front(tiny_model: Path, config: Any) -> None:
    """A new prompt of either kind is what the model makes of the same words, read before the text."""
    model = fresh(tiny_model)
    prompted = attach(model, None, prompt=config, seed=4)
    ours = logits(model)
    prompted.detach()
    words = torch.randint(0, 384, (1, 5), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want = model(torch.cat([words.expand(2, -1), TOKENS], dim=1)).logits[:, 5:]
    assert float((ours - want).abs().max()) < 1e-4


SIZES = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@both
@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
        ModernBertDecoderConfig(**SIZES, intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ],
    ids=["opt: its causal model calls the decoder of its base model", "modernbert: its decoder is its output layer"],
)
def test_the_module_that_the_model_calls_gets_it(config: Any, sizes: Any) -> None:
    model = AutoModelForCausalLM.from_config(sizes).eval()
    prompted = trained(model, config)
    ours = model(TOKENS).logits
    prompted.detach()
    assert float((ours - plainly(model, prompted, TOKENS)).abs().max()) < 1e-4
    assert float((ours - model(TOKENS).logits).abs().max()) > 1e-3


def test_a_model_that_passes_no_virtual_tokens_on_is_refused() -> None:
    stablelm = AutoModelForCausalLM.from_config(StableLmConfig(**SIZES, intermediate_size=48, num_key_value_heads=4))
    with pytest.raises(ModelError, match=r"StableLmForCausalLM cannot .*: 2 of its 2 layers have no attention, or"):
        attach(stablelm, None, prompt=CONFIGS[1])
    assert not any(module._forward_pre_hooks for module in stablelm.modules())


def test_bad_input(tiny_model: Path, tmp_path: Path, made_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"prefix.tokens must be at least 1, got 0"):
        PrefixTuningConfig(tokens=0)
    eager = fresh(tiny_model)
    eager.set_attn_implementation("eager")
    with pytest.raises(
        ModelError, match="attention 'eager'; a prompt needs a causal language model with attention 'sdpa'"
    ):
        attach(eager, None, prompt=CONFIGS[0])
    model = fresh(tiny_model)
    attach(model, None, prompt=CONFIGS[0]).save(tmp_path / "a")
    other = fresh(made_model(tmp_path / "wide", hidden_size=64))
    with pytest.raises(AdapterMismatch, match="are not those it was trained on"):
        load_adapter(other, tmp_path / "a")
    plain = logits(other)
    with pytest.raises(AdapterMismatch, match=r"prompt_embeddings: adapter has \(5, 32\), model needs \(5, 64\)"):
        load_adapter(other, tmp_path / "a", allow_other_base=True)
    assert torch.equal(logits(other), plain)
    save_file({"other": torch.zeros(5, 32)}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "veneer.json").unlink()
    with pytest.raises(AdapterMismatch, match="holds no prompt: peft_type 'PROMPT_TUNING' with other; wanted is one"):
        load_adapter(model, tmp_path / "a")
