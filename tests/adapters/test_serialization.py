"""Adapter folders against models: everything that does not fit is said at once, and nothing lands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.golden.toys import convolutions, gpt2, llama
from tests.methods.layers import moved
from veneer.adapters.attach import attach, load_adapter
from veneer.adapters.targets import Targeting
from veneer.base.base import Base
from veneer.base.fingerprint import base_fingerprint
from veneer.disk.adapter_dir import CONFIG, FACTS, TENSORS
from veneer.errors import AdapterMismatch
from veneer.methods.lora import LoRAConfig

PREFIX = "base_model.model."
FIRST = "model.layers.0.self_attn.q_proj"


def write(folder: Path, model: nn.Module, targets: Any = ("q_proj", "v_proj"), **config: Any) -> None:
    adapter = attach(Base.of(model, name="tiny"), LoRAConfig(**{"rank": 2, **config}), targets)
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.3, seed=n)
    adapter.save(folder, {"metrics": {"loss": 1.5}})
    adapter.detach()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "sql", llama())
    return tmp_path / "sql"


def as_peft(folder: Path) -> Path:
    """The folder as PEFT would have it: without our facts, so that its tensors may be changed."""
    (folder / FACTS).unlink(missing_ok=True)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(as_peft(folder) / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def refused(folder: Path, model: nn.Module | None = None, **allowed: bool) -> list[str]:
    model = model or llama()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(AdapterMismatch) as caught:
        load_adapter(model, folder, **allowed)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    return str(caught.value).splitlines()


def test_the_files_in_full(folder: Path) -> None:
    assert json.loads((folder / CONFIG).read_text()) == {
        "peft_type": "LORA", "r": 2, "lora_alpha": 16.0, "lora_dropout": 0.0, "use_rslora": False,
        "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none",
        "base_model_name_or_path": "tiny", "target_modules": ["q_proj", "v_proj"], "exclude_modules": None,
        "layers_to_transform": None, "fan_in_fan_out": False, "modules_to_save": None, "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }  # fmt: skip
    facts = json.loads((folder / FACTS).read_text())
    assert len(facts.pop("tensors_sha256")) == 64
    paths = [f"model.layers.{n}.self_attn.{p}" for n in range(3) for p in ("q_proj", "v_proj")]
    assert facts == {
        "format": 1,
        "method": "lora",
        "scales": dict.fromkeys(paths, 8.0),
        "roles": {"a": "in", "b": "out"},
        "base": {"name": "tiny", "fingerprint": base_fingerprint(llama())},
        "metrics": {"loss": 1.5},
    }
    tensors = load_file(folder / TENSORS)
    assert set(tensors) == {f"{PREFIX}{p}.{k}.weight" for p in paths for k in ("lora_A", "lora_B")}
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_scales_are_the_effective_ones(tmp_path: Path) -> None:
    write(
        tmp_path, llama(), rank=4, alpha=6, rank_stabilized=True, rank_pattern={"v_proj": 9}, alpha_pattern={FIRST: 2}
    )
    scales = json.loads((tmp_path / FACTS).read_text())["scales"]
    assert scales[FIRST] == 1.0
    assert scales["model.layers.1.self_attn.q_proj"] == 3.0
    assert scales["model.layers.1.self_attn.v_proj"] == 2.0


def test_everything_missing_unexpected_or_misshapen_is_listed_at_once(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PREFIX}{FIRST}.lora_B.weight"]
        tensors[f"{PREFIX}{FIRST}.lora_A.weight"] = torch.ones(3, 16)
        tensors[f"{PREFIX}{FIRST}.lora_E"] = torch.ones(1)
        tensors[f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 16)
        tensors["no.prefix"] = torch.ones(1)
        tensors[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"].fill_(float("nan"))

    change_tensors(folder, change)
    said = refused(folder)
    assert said[0] == f"adapter {folder} does not fit this LlamaForCausalLM; 6 differences:"
    assert sorted(said[1:-1]) == sorted(
        [
            f"  {PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight: in the adapter, not in the model",
            "  no.prefix: in the adapter, not in the model",
            f"  {FIRST}.lora_E: in the adapter, not in the model",
            f"  {FIRST}.lora_A.weight: adapter has (3, 16), model needs (2, 16)",
            f"  {FIRST}.lora_B.weight: in the model, not in the adapter",
            "  model.layers.1.self_attn.v_proj.lora_B.weight: holds numbers that are infinite or not a number",
        ]
    )
    assert said[-1] == "Nothing was loaded. Its base model is tiny."


def test_many_differences_are_counted_and_the_first_shown(folder: Path) -> None:
    wide = llama(hidden_size=32, num_hidden_layers=12)
    change_json(as_peft(folder) / CONFIG, base_model_name_or_path=None)
    said = refused(folder, wide)
    assert said[0].endswith("does not fit this LlamaForCausalLM; 48 differences:")
    assert len(said) == 1 + 20 + 1 + 1
    assert said[-2] == "  ... and 28 more"
    assert said[-1] == "Nothing was loaded. Its base model is the model it was trained on."


def test_a_target_without_tensors_and_tensors_without_a_target(folder: Path) -> None:
    change_json(as_peft(folder) / CONFIG, target_modules=["q_proj", "k_proj"])
    said = refused(folder)
    assert said[0].endswith("12 differences:")
    assert "  model.layers.2.self_attn.k_proj.lora_A.weight: in the model, not in the adapter" in said
    assert f"  {PREFIX}model.layers.2.self_attn.v_proj.lora_A.weight: in the adapter, not in the model" in said


def test_another_model_altogether(folder: Path) -> None:
    said = refused(folder, gpt2())
    assert said[0].startswith(f"adapter {folder} does not fit this GPT2LMHeadModel; 14 differences:")
    assert said[1].startswith("  the base model's weights are not those it was trained on")
    assert said[-2] == "  its targets ('q_proj', 'v_proj') match no layer of the model"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, "lora: rank must be at least 1, got 0"),
        ({"r": "two"}, "lora.rank is 'two': input should be a valid integer"),
        ({"lora_alpha": 0}, "lora: alpha must be a finite number other than 0, got 0"),
        ({"rank_pattern": 3}, "lora.rank_pattern is 3"),
        ({"target_modules": 5}, "target_modules should be a list of module names, but is 5"),
        (
            {"target_modules": [5]},
            "target_modules should be a list of module names, but is [5]",
        ),
        ({"target_modules": "q_("}, "target_modules 'q_(' is not a regular expression"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules should be a list of module names"),
        ({"layers_to_transform": "0"}, "layers_to_transform should be a list of numbers, but"),
        ({"layers_to_transform": [0.5]}, "layers_to_transform should be a list of numbers"),
        ({"layers_pattern": 1}, "layers_pattern should be a list of module names, but is 1"),
        ({"bias": "all"}, "this LoRA adapter uses bias, which veneer does not read"),
        (
            {"init_lora_weights": "olora"},
            "this LoRA adapter began with init_lora_weights 'olora'",
        ),
        (
            {"peft_type": "LORA", "lora_bias": True},
            "this LoRA adapter uses lora_bias",
        ),
    ],
)
def test_settings_that_cannot_be_understood_name_the_file(folder: Path, fields: dict[str, Any], said: str) -> None:
    change_json(as_peft(folder) / CONFIG, **fields)
    assert refused(folder)[0].startswith(f"{folder}/adapter_config.json: {said}")


@pytest.mark.parametrize("kind", ["TOMORROW", None, 3, ["LORA"]])
def test_an_unknown_peft_type_lists_the_known_methods(folder: Path, kind: Any) -> None:
    change_json(as_peft(folder) / CONFIG, peft_type=kind)
    said = refused(folder)[0]
    assert said.startswith(f"{folder}: peft_type {kind!r} is of no method known here; known: ")
    assert "lora" in said


def test_targets_that_match_nothing_here(folder: Path) -> None:
    change_json(as_peft(folder) / CONFIG, target_modules=["query"])
    assert "  its targets ('query',) match no layer of the model" in refused(folder)
    change_json(as_peft(folder) / CONFIG, target_modules=None)
    assert "  its targets () match no layer of the model" in refused(folder)


def test_settings_that_one_layer_refuses_are_listed_by_its_path(tmp_path: Path) -> None:
    write(tmp_path, convolutions(), ("line", "grouped"))
    change_json(as_peft(tmp_path) / CONFIG, r=3, rank_pattern={"(": 1})
    assert any("'(' in a pattern is not a regular expression" in line for line in refused(tmp_path, convolutions()))
    change_json(tmp_path / CONFIG, rank_pattern={})
    said = refused(tmp_path, convolutions())
    assert any(line.startswith("  grouped.lora.rank 3 is not divisible by the 2 groups") for line in said)
    assert "  line.lora_A.weight: adapter has (2, 4, 3), model needs (3, 4, 3)" in said


def test_a_rank_out_of_all_proportion_is_refused_before_memory_is_asked_for(folder: Path) -> None:
    change_json(as_peft(folder) / CONFIG, r=10**12)
    assert f"  {FIRST}.*: its settings ask for {32 * 10**12} numbers, it holds 64" in refused(folder)


def test_a_kind_that_the_method_cannot_change(tmp_path: Path) -> None:
    write(tmp_path, llama(), ("embed_tokens",))
    fields = {"use_mora": True, "mora_type": 6}
    change_json(as_peft(tmp_path) / CONFIG, **fields)
    said = refused(tmp_path)
    assert "  model.embed_tokens.weight: a layer of kind embedding, which mora cannot change" in said


@pytest.mark.parametrize("value", ["x", 2, None, [1]])
def test_a_format_from_the_future_is_refused(folder: Path, value: Any) -> None:
    change_json(folder / FACTS, format=value)
    assert refused(folder)[0] == f"{folder}: veneer.json has format {value!r}, known here is 1; update veneer"


@pytest.mark.parametrize("base", ["x", [], None, {}, {"fingerprint": None}])
def test_facts_without_a_fingerprint_are_as_none(folder: Path, base: Any) -> None:
    change_json(folder / FACTS, base=base)
    assert load_adapter(llama(), folder).attached


def test_invalid_json_names_the_file(folder: Path) -> None:
    (folder / CONFIG).write_text("{'r': 2}")
    assert refused(folder)[0].startswith(f"{folder / CONFIG} is not valid JSON: ")


def test_an_adapter_that_folding_cannot_see_has_no_effect(folder: Path) -> None:
    """A delta below the weights' own rounding is none, though its numbers are not 0."""

    def shrink(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.mul_(1e-20)

    change_tensors(folder, shrink)
    assert "  it changes nothing: every delta is zero (an untrained adapter?)" in refused(folder)
    assert load_adapter(llama(), folder, allow_no_effect=True).attached


def test_one_trained_layer_is_an_effect(folder: Path) -> None:
    def keep_one(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if FIRST not in key:
                tensor.zero_()

    change_tensors(folder, keep_one)
    assert load_adapter(llama(), folder).attached


def stray(folder: Path, key: str, tensor: Tensor) -> None:
    change_tensors(folder, lambda tensors: tensors.update({PREFIX + key: tensor.clone()}))


@pytest.mark.parametrize("key", ["model.embed_tokens.base_layer.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_copy_of_the_bases_own_weight_is_passed_over(folder: Path, key: str) -> None:
    """PEFT stores embeddings whole when they are targets or were resized."""
    stray(folder, key, llama().lm_head.weight.detach())
    assert load_adapter(llama(), folder).attached
    stray(folder, key, llama().lm_head.weight.detach().bfloat16())
    assert load_adapter(llama(), folder).attached


@pytest.mark.parametrize("other", [torch.ones(24, 16), torch.ones(25, 16), torch.ones(1)])
def test_another_base_weight_is_refused(folder: Path, other: Tensor) -> None:
    stray(folder, "model.embed_tokens.base_layer.weight", other)
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    said = f"  {key}: the adapter brings its own base weight, which differs from the model's"
    assert said in refused(folder)


@pytest.mark.parametrize(
    "key", ["model.norm.base_layer.bias", "model.base_layer.weight", "x..y", ".", "base_layer.weight"]
)
def test_strange_keys_are_listed(folder: Path, key: str) -> None:
    stray(folder, key, torch.ones(1))
    assert f"  {PREFIX}{key}: in the adapter, not in the model" in refused(folder)


def test_tensors_without_pefts_prefix_do_not_land(folder: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix(PREFIX)] = tensors.pop(key)

    change_tensors(folder, strip)
    said = refused(folder)
    assert f"  {FIRST}.lora_A.weight: in the adapter, not in the model" in said
    assert said[0].endswith("24 differences:"), "12 that have no place, 12 that are missing"


@pytest.mark.parametrize(
    ("targeting", "written"),
    [
        (Targeting(targets=("q_proj", "v_proj")), ["q_proj", "v_proj"]),
        (Targeting(targets=("q_proj",), layers=(0, 2)), [f"model.layers.{n}.self_attn.q_proj" for n in (0, 2)]),
        (Targeting(targets=("q_proj",), exclude=r".*\.[12]\..*"), [FIRST]),
        (Targeting(targets=r".*(q|v)_proj"), r".*(q|v)_proj"),
        (Targeting(targets=r".*self_attn.*"), ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (Targeting(), ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_the_shortest_names_that_mean_the_same_are_written(
    targeting: Targeting, written: str | list[str], tmp_path: Path
) -> None:
    write(tmp_path, llama(), targeting)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == written


@pytest.mark.parametrize(
    ("make", "targets", "fan_in_fan_out", "task"),
    [
        (llama, ("q_proj",), False, "CAUSAL_LM"),
        (gpt2, ("c_attn",), True, "CAUSAL_LM"),
        (gpt2, ("c_attn", "lm_head"), False, "CAUSAL_LM"),
        (gpt2, ("c_attn", "wte"), False, "CAUSAL_LM"),
        (convolutions, ("line", "head"), False, None),
    ],
)
def test_what_peft_has_to_know_of_the_model(
    make: Callable[[], nn.Module], targets: tuple[str, ...], fan_in_fan_out: bool, task: str | None, tmp_path: Path
) -> None:
    write(tmp_path, make(), targets)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["fan_in_fan_out"] is fan_in_fan_out
    assert config["task_type"] == task


def test_an_encoder_and_decoder_are_named_as_such(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    write(tmp_path, T5ForConditionalGeneration(T5Config(**shape)), ("q", "v"))
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, nn.Module, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder, llama(num_hidden_layers=1), ("q_proj", "embed_tokens"))
    return folder, (folder / TENSORS).read_bytes(), llama(num_hidden_layers=1), load_file(folder / TENSORS)


@st.composite
def damage(draw: st.DrawFn, size: int = 4900, header: int = 700) -> Callable[[bytes], bytes]:
    """Bytes changed (half of the time in the header), a piece cut out, or the end cut off."""
    kind = draw(st.sampled_from(["flip", "byte", "cut", "end"]))
    at = draw(st.one_of(st.integers(0, header), st.integers(0, size)))
    n = draw(st.integers(1, 64))
    bits = draw(st.integers(1, 255))

    def apply(data: bytes) -> bytes:
        place = at % len(data)
        if kind == "flip":
            return data[:place] + bytes([data[place] ^ (1 << bits % 8)]) + data[place + 1 :]
        if kind == "byte":
            return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]
        return data[:place] + data[place + n :] if kind == "cut" else data[:place]

    return apply


fuzzing = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzing
@given(change=damage())
def test_no_damage_to_our_tensors_is_ever_loaded(change: Callable[[bytes], bytes], fuzzed: Any) -> None:
    folder, data, model, _ = fuzzed
    broken = change(data)
    (folder / TENSORS).write_bytes(broken)
    if broken == data:
        load_adapter(model, folder).detach()
        return
    with pytest.raises(AdapterMismatch):
        load_adapter(model, folder)


@fuzzing
@given(change=damage())
def test_damaged_tensors_of_peft_are_refused_or_loaded_as_they_stand(
    change: Callable[[bytes], bytes], fuzzed: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """PEFT stores no checksum, so a changed number is only another number; but it is never any other exception."""
    folder, data, model, _ = fuzzed
    bare = tmp_path_factory.getbasetemp() / "bare"
    bare.mkdir(exist_ok=True)
    (bare / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    (bare / TENSORS).write_bytes(change(data))
    try:
        adapter = load_adapter(model, bare)
    except AdapterMismatch:
        assert not any(m._forward_hooks for m in model.modules())
        return
    stored = load_file(bare / TENSORS)
    loaded = {f"{PREFIX}{p}.{k}": t for p, d in adapter.deltas.items() for k, t in d.tensors().items()}
    adapter.detach()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[k].float(), loaded[k]) for k in loaded)


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**13) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@fuzzing
@given(
    fields=st.dictionaries(
        st.sampled_from(
            ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern",
             "alpha_pattern", "bias", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
             "modules_to_save", "use_dora", "use_mora", "base_model_name_or_path"]
        ),
        SCRAPS, min_size=1, max_size=3,
    )
)  # fmt: skip
def test_odd_settings_are_refused_or_loaded(fields: dict[str, Any], fuzzed: Any, tmp_path_factory: Any) -> None:
    folder, data, model, _ = fuzzed
    odd = tmp_path_factory.getbasetemp() / "odd"
    odd.mkdir(exist_ok=True)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | fields
    (odd / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (odd / TENSORS).write_bytes(data)
    try:
        load_adapter(model, odd).detach()
    except AdapterMismatch:
        assert not any(m._forward_hooks for m in model.modules())
