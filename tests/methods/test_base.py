"""Settings, patterns and the contract of deltas that the battery in tests/contracts does not reach."""

import pytest
import torch
from torch import Tensor

from tests.methods.layers import delta_on, layer_of, linear
from veneer.errors import AdapterMismatch, ConfigError, NotFoldable
from veneer.methods.base import METHODS, Delta, config_from, first_match, refuse_idle_patterns
from veneer.methods.lora import LoRAConfig


def test_settings_are_typed() -> None:
    assert config_from("lora", {"rank": 4, "alpha": 8}) == LoRAConfig(rank=4, alpha=8.0)


def test_an_unknown_method_names_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"there is no method 'lroa'\. Did you mean 'lora'"):
        config_from("lroa", {})


def test_unknown_settings_are_all_named_with_close_ones_and_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from("lora", {"rnk": 4, "rank": 4, "zebra": 1})
    said = str(caught.value).splitlines()
    assert said[0] == "method lora has no setting 'rnk'. Did you mean 'rank'?"
    assert said[1] == "method lora has no setting 'zebra'."
    assert said[2].startswith("It has: targets, rank, alpha, rank_pattern, alpha_pattern, dropout")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, r"^lora: rank must be at least 1, got 0$"),
        ({"rank": -3}, r"rank must be at least 1, got -3"),
        ({"rank": "many"}, r"lora\.rank is 'many': input should be a valid integer"),
        ({"rank": 2.5}, r"lora\.rank is 2\.5: input should be a valid integer"),
        ({"rank": None}, r"lora\.rank is None"),
        ({"alpha": "x", "rank": "y"}, r"(?s)lora\.rank is 'y'.*\nlora\.alpha is 'x'"),
        ({"alpha": 0}, r"^lora: alpha must be a finite number other than 0, got 0"),
        ({"alpha": float("nan")}, r"alpha must be a finite number other than 0, got nan"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be at least 1, got 0"),
        ({"rank_pattern": 3}, r"lora\.rank_pattern is 3"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, r"alpha_pattern\['q_proj'\] must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from("lora", settings)


@pytest.mark.parametrize(
    ("key", "path", "fits"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.layers.0.self_attn.xq_proj", False),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("q_proj", "q_proj.inner", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        (r"layers\.[01]\..*", "model.layers.1.mlp.up_proj", True),
        (r"layers\.[01]\..*", "model.layers.2.mlp.up_proj", False),
        ("^model.layers.0.q", "model.layers.0.q", True),
        ("^layers.0.q", "model.layers.0.q", False),
        ("q|k", "a.k", True),
    ],
)
def test_patterns_fit_path_ends(key: str, path: str, fits: bool) -> None:
    assert first_match({key: True}, path, False) is fits


def test_the_first_pattern_that_fits_counts() -> None:
    assert first_match({"b": 1, "a.b": 2}, "x.a.b", 0) == 1
    assert first_match({"a.b": 2, "b": 1}, "x.a.b", 0) == 2
    assert first_match({}, "x.a.b", 7) == 7


def test_patterns_become_a_layers_own_settings() -> None:
    config = LoRAConfig(rank=8, alpha=16, rank_pattern={"q": 2}, alpha_pattern={"k": 3})
    assert config.at("a.q") == LoRAConfig(rank=2, alpha=16)
    assert config.at("a.k") == LoRAConfig(rank=8, alpha=3)
    assert config.at("a.v") == LoRAConfig(rank=8, alpha=16)


def test_a_pattern_that_is_no_regular_expression_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'q\(' in a pattern is not a regular expression"):
        LoRAConfig(rank_pattern={"q(": 2}).at("a.q")


def test_patterns_that_fit_no_target_are_all_named() -> None:
    config = LoRAConfig(rank_pattern={"q_prj": 2, "q_proj": 3}, alpha_pattern={"zebra": 1.0})
    with pytest.raises(ConfigError) as caught:
        refuse_idle_patterns(config, ["layers.0.q_proj", "layers.0.k_proj"])
    said = str(caught.value)
    assert said.startswith("lora: rank_pattern['q_prj'] fits no target. Did you mean 'q_proj'")
    assert said.endswith("alpha_pattern['zebra'] fits no target.")
    assert len(said.splitlines()) == 2


class Bare(Delta):
    """A method that is no change of a weight and says nothing more than it must."""

    roles = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(layer_of(linear(2, 2)), None, torch.Generator())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    n_params = to_peft = from_peft = classmethod(lambda *_: None)  # type: ignore[assignment]

    def tensors(self) -> dict[str, Tensor]:
        return {}


def test_what_a_method_does_not_say_is_refused_by_its_name() -> None:
    delta, x = Bare(), torch.ones(2)
    with pytest.raises(NotFoldable, match="Bare is not a change of one weight, so it cannot be folded into it"):
        delta.fold(torch.eye(2))
    assert delta.before(x) is x
    assert delta.fold_bias(x) is x


def test_a_delta_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Delta(layer_of(linear(2, 2)), None, torch.Generator())  # type: ignore[abstract]


def test_half_precision_tensors_are_loaded_into_float32() -> None:
    delta = delta_on(linear(4, 4), LoRAConfig(rank=2))
    given = {k: torch.full(t.shape, 1 / 3, dtype=torch.bfloat16) for k, t in delta.tensors().items()}
    delta.load_(given)
    assert delta.a.dtype == torch.float32
    assert torch.equal(delta.a, given["lora_A.weight"].float())


def test_several_differences_are_one_message() -> None:
    delta = delta_on(linear(4, 6), LoRAConfig(rank=2))
    with pytest.raises(AdapterMismatch) as caught:
        delta.check({"lora_A.weight": torch.ones(3, 4), "lora_E": torch.ones(1)})
    assert str(caught.value).splitlines() == [
        "lora_E: in the adapter, not in the model",
        "lora_A.weight: adapter has (3, 4), model needs (2, 4)",
        "lora_B.weight: in the model, not in the adapter",
    ]


def test_lora_is_registered() -> None:
    assert METHODS["lora"].Config is LoRAConfig
