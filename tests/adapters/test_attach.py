"""Adapters on models: hung by hooks, taken off without a trace, loaded only where they belong."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.adapters.shaken import shake, shown
from tests.golden.toys import convolutions, llama
from veneer.adapters.attach import attach, load_adapter
from veneer.adapters.targets import Targeting
from veneer.base.base import Base
from veneer.errors import AdapterMismatch, ConfigError, TargetError
from veneer.methods.lora import LoRAConfig
from veneer.methods.mora import MoRAConfig


def test_detached_the_model_is_bit_identical_to_before() -> None:
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    plain, state = shown(model), {k: t.clone() for k, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = [type(m) for m in model.modules()]
    targets = Targeting(targets=("q_proj", "down_proj", "embed_tokens", "lm_head"))
    adapter = shake(attach(model, LoRAConfig(rank=2), targets))
    assert adapter.attached
    assert not torch.equal(shown(model), plain)
    assert [type(m) for m in model.modules()] == modules
    assert list(model.state_dict()) == list(state)
    adapter.detach()
    assert not adapter.attached
    assert torch.equal(shown(model), plain)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attaching_twice_is_attaching_once() -> None:
    model = llama()
    adapter = shake(attach(model, LoRAConfig(rank=2)))
    there = shown(model)
    assert torch.equal(shown(adapter.attach().model), there)
    plain = shown(adapter.detach().detach().model)
    assert torch.equal(plain, shown(llama()))
    assert torch.equal(shown(adapter.attach().model), there)
    assert not any(p.requires_grad for p in model.parameters())


def test_detached_for_a_while() -> None:
    model = llama()
    plain = shown(model)
    adapter = shake(attach(model, LoRAConfig(rank=2)))
    there = shown(model)
    with pytest.raises(KeyError), adapter.disabled() as base:
        assert torch.equal(shown(base), plain)
        raise KeyError
    assert adapter.attached
    assert torch.equal(shown(model), there)
    with adapter.detach().disabled():
        pass
    assert not adapter.attached


def test_patterns_reach_their_layers() -> None:
    config = LoRAConfig(rank=4, alpha=8, rank_pattern={"k_proj": 1}, alpha_pattern={r"layers\.0\..*": 2})
    adapter = attach(llama(), config, ("q_proj", "k_proj"))
    seen = {p: (d.a.shape[0], d.scale) for p, d in adapter.deltas.items()}
    assert seen["model.layers.0.self_attn.q_proj"] == (4, 0.5)
    assert seen["model.layers.0.self_attn.k_proj"] == (1, 2)
    assert seen["model.layers.1.self_attn.q_proj"] == (4, 2)
    assert seen["model.layers.1.self_attn.k_proj"] == (1, 8)


def test_the_seed_decides_the_start() -> None:
    def start(seed: int) -> Tensor:
        return attach(llama(), LoRAConfig(rank=2), seed=seed).parameters()[0].detach()

    torch.manual_seed(1)
    one = start(0)
    torch.manual_seed(2)
    assert torch.equal(start(0), one)
    assert not torch.equal(start(1), one)


REFUSED = [
    (LoRAConfig(rank=2), ("q_prj",), TargetError, "target 'q_prj' matches no module. Did you mean 'q_proj'"),
    (
        LoRAConfig(rank=2),
        ("mlp",),
        TargetError,
        "matches model.layers.0.mlp (LlamaMLP), no layer that a method can change",
    ),
    (LoRAConfig(rank=2), (), TargetError, "leave no module of LlamaForCausalLM"),
    (MoRAConfig(rank=2), ("embed_tokens",), TargetError, "embed_tokens is a layer of kind embedding"),
    (
        LoRAConfig(rank_pattern={"o_proj": 2}),
        ("q_proj",),
        ConfigError,
        "rank_pattern['o_proj'] fits no target. Did you mean",
    ),
    (LoRAConfig(alpha_pattern={"q(": 2}), ("q_proj",), ConfigError, "'q(' in a pattern is not a regular expression"),
]


@pytest.mark.parametrize(("config", "targets", "kind", "said"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_changed(
    config: LoRAConfig, targets: tuple[str, ...], kind: type[Exception], said: str
) -> None:
    model = llama()
    with pytest.raises(kind) as caught:
        attach(model, config, targets)
    assert said in str(caught.value)
    untouched(model)


def untouched(model: nn.Module) -> None:
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_refuses_the_settings_is_named_by_its_path() -> None:
    model = convolutions()
    with pytest.raises(ConfigError, match=r"grouped: lora\.rank 3 is not divisible by the 2 groups"):
        attach(model, LoRAConfig(rank=3), ("line", "grouped"))
    untouched(model)


def saved(folder: Path) -> Path:
    adapter = shake(attach(Base.of(llama(), name="tiny"), LoRAConfig(rank=2), ("q_proj", "embed_tokens")))
    adapter.save(folder / "adapter", {"metrics": {"loss": 1.5}})
    return folder / "adapter"


def test_a_loaded_adapter_gives_the_same_outputs_bit_for_bit(tmp_path: Path) -> None:
    model = llama()
    adapter = shake(attach(Base.of(model, name="tiny"), LoRAConfig(rank=2, dropout=0.3), ("q_proj", "embed_tokens")))
    size = adapter.save(tmp_path / "adapter")
    assert size == sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    other = llama()
    loaded = load_adapter(other, tmp_path / "adapter")
    assert torch.equal(shown(other), shown(model))
    assert loaded.settings == adapter.settings
    assert loaded.base_name == "tiny" and loaded.name == "adapter"
    assert loaded.attached
    assert not any(d.training for d in loaded.deltas.values())
    assert not any(p.requires_grad for p in other.parameters())


def test_two_adapters_on_one_model_add_up_and_come_off_one_by_one(tmp_path: Path) -> None:
    model = llama()
    plain = shown(model)
    one = load_adapter(model, saved(tmp_path))
    alone = shown(model)
    two = shake(attach(model, LoRAConfig(rank=1), ("v_proj",)))
    assert not torch.equal(shown(model), alone)
    two.detach()
    assert torch.equal(shown(model), alone)
    one.detach()
    assert torch.equal(shown(model), plain)
    assert all(p.requires_grad for p in model.parameters())


def test_loading_into_another_base_is_refused_or_allowed(tmp_path: Path) -> None:
    other = llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    with pytest.raises(AdapterMismatch) as caught:
        load_adapter(other, saved(tmp_path))
    assert str(caught.value).splitlines() == [
        f"adapter {tmp_path / 'adapter'} does not fit this LlamaForCausalLM; 1 difference:",
        "  the base model's weights are not those it was trained on (allow_other_base=True loads it all the same)",
        "Nothing was loaded. Its base model is tiny.",
    ]
    untouched(other)
    load_adapter(other, tmp_path / "adapter", allow_other_base=True)
    assert not torch.equal(shown(other), shown(llama()))


def test_the_same_base_in_bfloat16_is_no_other_base(tmp_path: Path) -> None:
    assert load_adapter(llama().bfloat16(), saved(tmp_path)).attached


def test_an_adapter_without_effect_is_refused_or_allowed(tmp_path: Path) -> None:
    attach(llama(), LoRAConfig(rank=2)).save(tmp_path)
    model = llama()
    with pytest.raises(AdapterMismatch, match="it changes nothing: every delta is zero"):
        load_adapter(model, tmp_path)
    untouched(model)
    load_adapter(model, tmp_path, allow_no_effect=True)
    assert torch.equal(shown(model), shown(llama()))


def test_a_missing_folder(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(AdapterMismatch, match=r"there is no adapter folder .*adaptr\. Did you mean 'adapter'\?"):
        load_adapter(model, saved(tmp_path).with_name("adaptr"))
    untouched(model)


def test_what_is_saved_is_the_parameters(tmp_path: Path) -> None:
    adapter = load_adapter(llama(), saved(tmp_path))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    path = "model.layers.2.self_attn.q_proj"
    assert torch.equal(stored[f"base_model.model.{path}.lora_A.weight"], adapter.deltas[path].a)
    assert torch.equal(
        stored["base_model.model.model.embed_tokens.lora_embedding_B"], adapter.deltas["model.embed_tokens"].b
    )
