"""PEFT's folders load here and ours load there, with equal outputs: stored bytes first, then the library itself.

Where PEFT 0.21.2 is itself wrong (dilated convolutions fail, other padding modes than zeros are merged wrongly) ours
is held to the oracle only, in tests/methods/test_lora.py.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.golden.make_peft import trained
from tests.golden.toys import CASES, MODELS, inputs, outputs
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach, load_adapter
from veneer.adapters.targets import Targeting
from veneer.errors import AdapterMismatch
from veneer.methods.lora import LoRAConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
TOLERANCE = 1e-4
every_case = pytest.mark.parametrize("case", CASES)


@torch.no_grad()
def shown(model: nn.Module, x: Tensor) -> Tensor:
    return outputs(model, x)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def drift(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@every_case
def test_what_peft_wrote_loads_with_the_outputs_it_gave(case: str) -> None:
    name, _ = CASES[case]
    model, x, folder = MODELS[name](), inputs(name), GOLDEN / case.replace(" ", "_")
    plain, state = shown(model, x), state_of(model)
    want = load_file(folder / "outputs.safetensors")["y"]
    assert drift(plain, want) > 0.05, "the adapter changes too little for a comparison"
    adapter = load_adapter(model, folder)
    assert drift(shown(model, x), want) <= TOLERANCE
    stored = {k for k in load_file(folder / "adapter_model.safetensors") if ".base_layer." not in k}
    ours = {f"base_model.model.{p}.{k}" for p, d in adapter.deltas.items() for k in d.tensors()}
    assert ours == stored
    adapter.detach()
    assert torch.equal(shown(model, x), plain)
    assert same(state_of(model), state)


@every_case
def test_what_peft_wrote_is_written_again_with_the_same_tensors_and_meaning(case: str, tmp_path: Path) -> None:
    name, _ = CASES[case]
    model, x, folder = MODELS[name](), inputs(name), GOLDEN / case.replace(" ", "_")
    load_adapter(model, folder).save(tmp_path / "ours")
    there = {k: t for k, t in load_file(folder / "adapter_model.safetensors").items() if ".base_layer." not in k}
    assert same(
        dict(sorted(load_file(tmp_path / "ours" / "adapter_model.safetensors").items())), dict(sorted(there.items()))
    )
    again = MODELS[name]()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(shown(again, x), shown(model, x))


def test_the_stored_folders_are_one_per_case_and_small() -> None:
    assert {p.name for p in GOLDEN.iterdir()} == {c.replace(" ", "_") for c in CASES}
    for folder in GOLDEN.iterdir():
        assert json.loads((folder / "adapter_config.json").read_text())["peft_version"] == "0.21.2"
        assert sum(f.stat().st_size for f in folder.iterdir()) < 16_000


@pytest.fixture
def peft() -> Iterator[Any]:
    library = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied weights, fan_in_fan_out, groups and deprecations
        yield library


def there(peft: Any, name: str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(MODELS[name](), str(folder)).eval()


def steps(adapter: Adapter, x: Tensor, n: int = 4) -> None:
    """A few real steps, so that the adapter's numbers are trained ones."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(n):
        y = outputs(adapter.model, x)
        (y - torch.sin(torch.arange(y.numel()).reshape(y.shape) * 1.3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@every_case
def test_trained_in_peft_it_loads_here(case: str, tmp_path: Path, peft: Any) -> None:
    name, settings = CASES[case]
    x = inputs(name)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        theirs = trained(MODELS[name](), settings, x)
    theirs.save_pretrained(str(tmp_path))
    model = MODELS[name]()
    load_adapter(model, tmp_path)
    assert drift(shown(model, x), shown(MODELS[name](), x)) > 0.05
    assert drift(shown(model, x), shown(theirs, x)) <= TOLERANCE


def targeting(settings: dict[str, Any]) -> Targeting:
    def named(value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value or ())

    layers = settings.get("layers_to_transform") or ()
    return Targeting(
        targets=named(settings["target_modules"]),
        exclude=named(settings.get("exclude_modules")),
        layers=(layers,) if isinstance(layers, int) else tuple(layers),
    )


def config(settings: dict[str, Any]) -> LoRAConfig:
    return LoRAConfig(
        rank=settings["r"],
        alpha=settings.get("lora_alpha", 8),
        dropout=settings.get("lora_dropout", 0.0),
        rank_stabilized=settings.get("use_rslora", False),
        rank_pattern=settings.get("rank_pattern", {}),
        alpha_pattern=settings.get("alpha_pattern", {}),
    )


@every_case
def test_trained_here_it_loads_in_peft(case: str, tmp_path: Path, peft: Any) -> None:
    name, settings = CASES[case]
    model, x = MODELS[name](), inputs(name)
    plain, state = shown(model, x), state_of(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapter = attach(model, config(settings), targeting(settings))
    steps(adapter, x)
    here = shown(adapter.eval().model, x)
    assert drift(here, plain) > 0.05
    adapter.save(tmp_path)
    theirs = there(peft, name, tmp_path)
    assert drift(shown(theirs, x), here) <= TOLERANCE
    layers = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert layers == set(adapter.deltas), "peft adapts other modules"
    adapter.detach()
    assert torch.equal(shown(model, x), plain)
    assert same(state_of(model), state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_a_rank_pattern_means_the_same_scale_layer_by_layer(tmp_path: Path, peft: Any) -> None:
    name, settings = CASES["patterns"]
    model = MODELS[name]()
    adapter = attach(model, config({**settings, "use_rslora": True}), targeting(settings))
    steps(adapter, inputs(name))
    adapter.save(tmp_path)
    theirs = there(peft, name, tmp_path).get_base_model()
    for path, delta in adapter.deltas.items():
        assert theirs.get_submodule(path).scaling["default"] == pytest.approx(delta.scale), path


def test_an_expression_that_also_names_other_modules_is_written_as_names(tmp_path: Path, peft: Any) -> None:
    """PEFT fails on a matched module that is no layer; here such an expression means the layers among them."""
    model, x = MODELS["llama"](), inputs("llama")
    adapter = attach(model, LoRAConfig(rank=2), r".*self_attn.*")
    steps(adapter, x)
    adapter.save(tmp_path)
    assert drift(shown(there(peft, "llama", tmp_path), x), shown(model, x)) <= TOLERANCE


def test_a_name_that_ends_other_names_is_written_as_an_expression(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.inner = nn.Linear(3, 3), nn.ModuleDict({"proj": nn.Linear(3, 3)})

    adapter = attach(Outer(), LoRAConfig(rank=1, init="random"), Targeting(targets=("proj",), exclude=("inner.proj",)))
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "proj"
    assert list(load_adapter(Outer(), tmp_path, allow_other_base=True).deltas) == ["proj"]


def test_embeddings_that_scale_their_rows(tmp_path: Path, peft: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.golden.toys import fill_

    def gemma() -> nn.Module:
        shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}  # fmt: skip
        config = transformers.Gemma3TextConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        return fill_(transformers.Gemma3ForCausalLM(config))

    x = inputs("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = trained(gemma(), {"target_modules": ["embed_tokens"], "r": 2}, x)
    theirs.save_pretrained(str(tmp_path))
    model = gemma()
    load_adapter(model, tmp_path)
    assert drift(shown(theirs, x), shown(gemma(), x)) > 0.05
    assert drift(shown(theirs, x), shown(model, x)) <= TOLERANCE


def test_an_adapter_kept_in_bfloat16_is_read_exactly(tmp_path: Path, peft: Any) -> None:
    x = inputs("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"target_modules": ["q_proj", "embed_tokens"], "r": 2}
        theirs = trained(MODELS["llama"]().bfloat16(), settings, x, autocast_adapter_dtype=False)
    theirs.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    adapter = load_adapter(MODELS["llama"]().bfloat16(), tmp_path)
    for path, delta in adapter.deltas.items():
        for key, tensor in delta.tensors().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, stored[f"base_model.model.{path}.{key}"].float())
    load_adapter(MODELS["llama"](), tmp_path)  # PEFT's copy of the embedding is rounded, the base is not: no other base


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_against_a_changed_base_is_refused(start: str, tmp_path: Path, peft: Any) -> None:
    """Loaded as plain LoRA it would be silently wrong: PEFT subtracts the start from the base."""
    x = inputs("llama")
    theirs = trained(MODELS["llama"](), {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": start}, x)
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterMismatch, match=f"'{start}', which changes the base weights too"):
        load_adapter(MODELS["llama"](), tmp_path)


@pytest.mark.parametrize("base", ["default", "all"])
def test_saved_with_whole_embeddings_it_loads_where_they_are_the_models_own(
    base: str, tmp_path: Path, peft: Any
) -> None:
    x = inputs("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = trained(MODELS["llama"](), {"target_modules": ["q_proj"], "r": 2}, x)
        if base == "all":
            with torch.no_grad():
                theirs.get_input_embeddings().weight.add_(1.0)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    model = MODELS["llama"]()
    if base == "default":
        load_adapter(model, tmp_path)
        assert drift(shown(theirs, x), shown(model, x)) <= TOLERANCE
    else:
        with pytest.raises(AdapterMismatch, match=r"embed_tokens\.weight: the adapter brings its own base weight"):
            load_adapter(model, tmp_path)
