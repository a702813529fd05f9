"""Modules trained in full beside LoRA, in PEFT's layout both ways."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.golden.toys import gpt2, inputs, outputs
from tests.methods.parity import TOKENS, fresh, logits, peft_loads
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach, load_adapter
from veneer.base.load import load_model
from veneer.errors import AdapterMismatch, ConfigError, TargetError
from veneer.merge.fold import merge
from veneer.methods.lora import LoRAConfig

LORA = LoRAConfig(rank=2)


def shaken(adapter: Adapter) -> Adapter:
    for n, holder in enumerate(adapter.holders().values()):
        with torch.no_grad():
            for p in holder.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    return adapter.eval()


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


CHOICES = [("norm",), ("lm_head", "norm"), ("embed_tokens",), ("embed_tokens", "lm_head"), ("layers.0.mlp",)]


@pytest.mark.parametrize("name", ["tiny_model", "tiny_untied"])
@pytest.mark.parametrize("modules", CHOICES, ids="+".join)
def test_saved_loaded_by_peft_merged_and_detached(
    name: str, modules: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    model = fresh(folder)
    plain, state = logits(model), {k: t.clone() for k, t in model.state_dict().items()}
    adapter = shaken(attach(model, LORA, trained_modules=modules))
    want = logits(model)
    assert far(want, plain) > 0.1
    assert list(model.state_dict()) == list(state)
    adapter.save(tmp_path / "a")
    assert far(logits(peft_loads(folder, tmp_path / "a")), want) < 1e-4
    other = fresh(folder)
    again = load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), want)
    again.save(tmp_path / "b")
    one, two = ((tmp_path / x / "adapter_model.safetensors").read_bytes() for x in "ab")
    assert one == two
    merge(again, folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert far(logits(merged), want) < 1e-4
    whole = modules == ("embed_tokens", "lm_head") or not {"embed_tokens", "lm_head"} & set(modules)
    assert merged.config.tie_word_embeddings == (name == "tiny_model" and whole)
    adapter.detach()
    assert torch.equal(logits(model), plain) and all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["tiny_model", "tiny_untied"])
@pytest.mark.parametrize(
    ("modules", "tying"), [(["lm_head", "norm"], False), (["embed_tokens"], True), (["embed_tokens"], False)]
)
def test_a_folder_of_pefts_is_read(
    name: str, modules: list[str], tying: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In PEFT `norm` names every module that ends so, `input_layernorm` too."""
    folder: Path = request.getfixturevalue(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=tying, init_lora_weights=False
        )
        made = peft.get_peft_model(fresh(folder), config).eval()
        with torch.no_grad():
            for key, p in made.named_parameters():
                if "modules_to_save" in key:
                    p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        want = logits(made)
        made.save_pretrained(str(tmp_path / "a"))
    model = fresh(folder)
    load_adapter(model, tmp_path / "a")
    assert far(logits(model), want) < 1e-4


def test_gradients_reach_the_whole_weight_in_float32_under_bfloat16(tiny_model: Path) -> None:
    model = fresh(tiny_model).bfloat16()
    adapter = attach(model, LORA, trained_modules=("norm", "embed_tokens", "lm_head"))
    model(TOKENS).logits.float().square().mean().backward()
    own = {n.path: n for n in adapter.named() if n.name == "weight"}
    assert list(own) == ["model.embed_tokens", "model.norm"], "the tied weight is one"
    assert {n.role for n in own.values()} == {"full", "scale"} and own["model.embed_tokens"].place == "embedding"
    assert all(n.parameter.dtype == torch.float32 == n.parameter.grad.dtype for n in own.values())  # type: ignore[union-attr]
    assert all(float(n.parameter.grad.abs().sum()) > 0 for n in own.values())  # type: ignore[union-attr]
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in model.parameters())


def test_an_error_inside_leaves_the_base_as_it_was(tiny_model: Path) -> None:
    model = fresh(tiny_model)
    before = model.model.norm.weight
    attach(model, LORA, trained_modules=("norm",))
    with pytest.raises(RuntimeError):
        model.model.norm(torch.ones(1, 3))
    assert model.model.norm.weight is before


def test_a_trained_module_gets_no_delta(tiny_model: Path) -> None:
    adapter = attach(fresh(tiny_model), LORA, trained_modules=("down_proj",))
    assert not any(path.endswith("down_proj") for path in adapter.deltas)


def test_biases_and_transposed_weights_are_trained_too(tmp_path: Path) -> None:
    model, x = gpt2(), inputs("gpt2")
    adapter = shaken(attach(model, LORA, ("c_attn",), trained_modules=("ln_f", "h.0.mlp.c_fc")))
    want = outputs(model, x)
    adapter.save(tmp_path / "a")
    other = gpt2()
    load_adapter(other, tmp_path / "a")
    assert torch.equal(outputs(other, x), want)
    assert {n.role for n in adapter.named()} == {"in", "out", "full", "scale", "bias"}


def test_what_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = fresh(tiny_model)
    with pytest.raises(TargetError, match=r"trained module 'lm_haed' matches no module\. Did you mean 'lm_head'\?"):
        attach(model, LORA, trained_modules=("lm_haed",))
    stored = load_model(tiny_model, storage="nf4", dtype="float32")
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.gate_proj.* is quantized"):
        attach(stored, LORA, trained_modules=("mlp",))
    attach(model, LORA, trained_modules=("lm_head",)).save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    for names, message in [
        (["lm_head", "norm"], "model.norm.weight: in the model, not in the adapter"),
        (3, "but is 3"),
    ]:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": names}))
        with pytest.raises(AdapterMismatch, match=message):
            load_adapter(fresh(tiny_model), tmp_path / "a")
