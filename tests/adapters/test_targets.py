"""Which modules are chosen, as PEFT would, and every name that chooses nothing."""

import re

import pytest
from torch import nn

from tests.golden.toys import convolutions, gpt2, llama
from veneer.adapters.targets import Targeting, all_matching, choose, matching
from veneer.errors import TargetError
from veneer.methods.base import Kind
from veneer.models.blocks import output_head

ALL: frozenset[Kind] = frozenset({"linear", "conv", "embedding"})
BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def chosen(model: nn.Module, kinds: frozenset[Kind] = ALL, **settings: object) -> list[str]:
    return choose(model, Targeting(**settings), kinds, "lora")  # type: ignore[arg-type]


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    assert chosen(llama()) == [f"model.layers.{n}.{name}" for n in range(3) for name in BLOCK]
    assert "lm_head" not in chosen(gpt2())
    assert "transformer.h.1.mlp.c_proj" in chosen(gpt2())
    assert chosen(nn.ModuleDict({"inner": nn.Linear(2, 2), "score": nn.Linear(2, 2)})) == ["inner"]


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"targets": ("q_proj",)}, ["0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.q_proj"]),
        ({"targets": ("self_attn.q_proj",), "layers": (1,)}, ["1.self_attn.q_proj"]),
        ({"targets": ("q_proj", "up_proj"), "layers": (0, 2), "exclude": ("0.mlp.up_proj",)},
         ["0.self_attn.q_proj", "2.self_attn.q_proj", "2.mlp.up_proj"]),
        ({"targets": ("model.layers.1.mlp.up_proj",)}, ["1.mlp.up_proj"]),
        ({"targets": r".*\.[02]\.mlp\.(up|down)_proj"},
         ["0.mlp.up_proj", "0.mlp.down_proj", "2.mlp.up_proj", "2.mlp.down_proj"]),
        ({"exclude": r".*(_attn|up_proj|gate_proj).*"}, ["0.mlp.down_proj", "1.mlp.down_proj", "2.mlp.down_proj"]),
        ({"targets": ("q_proj",), "layers": (2,), "blocks": ("layers",)}, ["2.self_attn.q_proj"]),
    ],
)  # fmt: skip
def test_targets_excludes_and_layers(settings: dict[str, object], ends: list[str]) -> None:
    assert chosen(llama(), **settings) == [f"model.layers.{end}" for end in ends]


def test_names_match_at_dots_only() -> None:
    assert chosen(llama(), targets=("embed_tokens",)) == ["model.embed_tokens"]
    with pytest.raises(TargetError, match="target 'proj' matches no module"):
        chosen(llama(), targets=("proj",))


def test_the_layer_number_is_the_first_in_the_path() -> None:
    """As PEFT: the block's number, not the expert's; or the one after a named list."""
    expert = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(2)])})
    inner = nn.ModuleDict({"layers": nn.ModuleList([expert])})
    for model, start in ((inner, "layers"), (nn.ModuleDict({"model": inner}), "model.layers")):
        assert chosen(model, layers=(0,)) == [f"{start}.0.experts.0.up", f"{start}.0.experts.1.up"]
        assert chosen(model, layers=(1,), blocks=("experts",)) == [f"{start}.0.experts.1.up"]


def test_every_kind_is_found() -> None:
    assert chosen(convolutions(), targets=("line", "plane", "head")) == ["line", "plane", "head"]


def refused(model: nn.Module, kinds: frozenset[Kind] = ALL, **settings: object) -> str:
    with pytest.raises(TargetError) as caught:
        chosen(model, kinds, **settings)
    return str(caught.value)


ENDINGS = "Its layers end in: down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."


def test_names_that_match_nothing_are_all_listed_with_close_ones() -> None:
    said = refused(llama(), targets=("q_prj", "v_proj", "zebra"), exclude=("embed_token",), layers=(1, 7, 9))
    assert said.splitlines() == [
        "targets do not fit this model:",
        "  target 'q_prj' matches no module. Did you mean 'q_proj' or 'v_proj' or 'o_proj'?",
        "  target 'zebra' matches no module.",
        "  exclude 'embed_token' matches no module. Did you mean 'embed_tokens' or 'model.embed_tokens'?",
        "  layers 7, 9 are not there: the model has layers 0 to 2",
        ENDINGS,
    ]


def test_an_expression_that_matches_nothing() -> None:
    said = refused(llama(), targets=r".*\.attn\..*")
    assert r"  target '.*\\.attn\\..*' matches no module" in said
    assert said.endswith(ENDINGS)


def test_a_name_of_a_module_that_is_no_layer() -> None:
    said = refused(llama(), targets=("mlp", "q_proj"))
    assert "  target 'mlp' matches model.layers.0.mlp (LlamaMLP), no layer that a method can change" in said
    assert "exclude 'mlp' matches model.layers.0.mlp (LlamaMLP), no layer" in refused(llama(), exclude=("mlp",))
    assert "'norm' matches model.norm (LlamaRMSNorm), no layer" in refused(llama(), targets=("norm",))


def test_targets_that_leave_nothing() -> None:
    said = refused(llama(), targets=("q_proj",), exclude=r".*q_proj")
    assert said == (
        f"targets ('q_proj',) with exclude '.*q_proj' and layers [] leave no module of LlamaForCausalLM. {ENDINGS}"
    )
    assert "leave no module of LlamaForCausalLM" in refused(llama(), targets=())
    assert "leave no module of ReLU. Its layers end in: none." in refused(nn.ReLU())


def test_a_kind_that_the_method_cannot_change() -> None:
    said = refused(convolutions(), frozenset({"linear"}), targets=("line", "head", "plane"))
    assert said.splitlines() == [
        "method lora changes layers of kind linear only, but:",
        "  line is a layer of kind conv",
        "  plane is a layer of kind conv",
        "Leave them out of method.targets, or take a method that changes them (`veneer list methods`).",
    ]


@pytest.mark.parametrize("where", ["targets", "exclude"])
def test_what_is_no_regular_expression(where: str) -> None:
    assert re.match(r"'q_\(' is not a regular expression: missing \)", refused(llama(), **{where: "q_("}))


def test_layers_of_a_model_without_numbers() -> None:
    assert "layers 0 are not there: the model has no numbered layers" in refused(convolutions(), layers=(0,))


def test_matching_passes_over_what_is_not_there() -> None:
    """As PEFT reads a stored list: a name that matches nothing changes nothing."""
    assert matching(llama(), Targeting(targets=("q_prj",))) == []
    assert len(matching(llama(), Targeting(targets=("q_prj", "q_proj")))) == 3


def test_all_matching_sees_modules_that_are_no_layers() -> None:
    assert all_matching(llama(), ("mlp",)) == [f"model.layers.{n}.mlp" for n in range(3)]
    assert all_matching(llama(), r"model\.layers\.0\.mlp\.?(up_proj)?") == [
        "model.layers.0.mlp",
        "model.layers.0.mlp.up_proj",
    ]


def test_output_heads() -> None:
    assert output_head(llama()) == "lm_head"
    assert output_head(nn.ModuleDict({"classifier": nn.Linear(2, 2)})) == "classifier"
    assert output_head(nn.ModuleDict({"other": nn.Linear(2, 2)})) is None


def test_a_weight_normed_layer_elsewhere_in_the_model_is_passed_over() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model = nn.ModuleDict({"normed": normed, "plain": nn.Linear(2, 2)})
    assert chosen(model) == ["plain"]
