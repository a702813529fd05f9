"""Which parameters take which rate and decay, by name."""

from typing import Any

import pytest
import torch
from torch import nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.adapters.part import NamedParameter
from veneer.errors import ConfigError
from veneer.methods.base import config_from
from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim import build_optimizer
from veneer.train.optim.param_groups import parameter_groups, set_learning_rates


def adapter(method: str, **settings: Any) -> Adapter:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    return attach(model, config_from(method, settings), r"[01]")


def named(on: Adapter, settings: OptimizerSettings) -> dict[str, tuple[float, float]]:
    """path.name -> (learning rate, weight decay)."""
    names = {id(n.parameter): f"{n.path}.{n.name}" for n in on.named()}
    groups = parameter_groups(on.named(), settings)
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_lora_plus_gives_the_ratio_to_b_alone() -> None:
    found = named(adapter("lora", rank=2), OptimizerSettings(lr=1e-3, lr_ratio=16, weight_decay=0.1))
    assert found == {
        "0.a": (1e-3, 0.1),
        "0.b": (pytest.approx(16e-3), 0.1),
        "1.a": (1e-3, 0.1),
        "1.b": (pytest.approx(16e-3), 0.1),
    }


def test_scales_keep_the_plain_rate_and_are_not_decayed() -> None:
    found = named(adapter("dora", rank=2), OptimizerSettings(lr=1e-3, lr_ratio=4, weight_decay=0.1))
    rates = {name.rpartition(".")[2]: value for name, value in found.items()}
    assert {k: v for k, v in rates.items() if k in ("a", "b")} == {"a": (1e-3, 0.1), "b": (4e-3, 0.1)}
    assert [v for k, v in rates.items() if k not in ("a", "b")] == [(1e-3, 0.0)]


def test_biases_keep_the_plain_rate_and_are_not_decayed() -> None:
    found = named(adapter("bitfit"), OptimizerSettings(lr=1e-3))
    assert list(found.values()) == [(1e-3, 0.0)] * 2


def test_every_parameter_is_in_one_group() -> None:
    on = adapter("dora", rank=2)
    members = [id(p) for g in parameter_groups(on.named(), OptimizerSettings()) for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in on.parameters())


def test_a_ratio_that_nothing_would_take_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r'optimizer.lr_ratio is 16.0.*no "out" factors that would take it, only bias;'
    ):
        parameter_groups(adapter("bitfit").named(), OptimizerSettings(lr_ratio=16))


def test_a_decay_that_nothing_would_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay is 0.1.*only bias parameters.*leave it at 0"):
        parameter_groups(adapter("bitfit").named(), OptimizerSettings(weight_decay=0.1))


def test_rates_are_scaled_from_their_own_top_and_told_by_role() -> None:
    on = adapter("lora", rank=2)
    optimizer = build_optimizer(on.named(), OptimizerSettings(lr=1e-2, lr_ratio=10))
    set_learning_rates(optimizer, 0.5)
    assert set_learning_rates(optimizer, 0.25) == {"in": pytest.approx(2.5e-3), "out": pytest.approx(2.5e-2)}
    assert {g["role"]: g["lr"] for g in optimizer.param_groups} == {"in": 2.5e-3, "out": pytest.approx(2.5e-2)}


def beside(**settings: Any) -> dict[str, tuple[float, float]]:
    """LoRA on an embedding and a linear layer, and a prompt: path.name -> (learning rate, weight decay)."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6, bias=False))
    on = attach(model, config_from("lora", {"rank": 2}), r"[01]").named()
    on.append(NamedParameter("prompt", "table", "full", nn.Parameter(torch.zeros(3, 4)), "prompt"))
    names = {id(n.parameter): f"{n.path}.{n.name}" for n in on}
    groups = parameter_groups(on, OptimizerSettings(lr=1e-3, weight_decay=0.1, **settings))
    assert len({g["role"] for g in groups}) == len(groups), "each group is told by a label of its own"
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_embeddings_and_prompts_follow_their_roles_unless_told_otherwise() -> None:
    assert beside(lr_ratio=8) == {
        "0.a": (1e-3, 0.1),
        "0.b": (8e-3, 0.1),
        "1.a": (1e-3, 0.1),
        "1.b": (8e-3, 0.1),
        "prompt.table": (1e-3, 0.1),
    }


def test_rates_of_their_own_for_both_factors_of_an_embedding_and_for_a_prompt() -> None:
    assert beside(lr_ratio=8, lr_embedding=1e-6, lr_prompt=0.3) == {
        "0.a": (1e-6, 0.1),
        "0.b": (1e-6, 0.1),
        "1.a": (1e-3, 0.1),
        "1.b": (8e-3, 0.1),
        "prompt.table": (0.3, 0.1),
    }


def test_rates_are_told_by_role_and_place() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6, bias=False))
    on = attach(model, config_from("lora", {"rank": 2}), r"[01]").named()
    optimizer = build_optimizer(on, OptimizerSettings(lr=1e-2, lr_ratio=2, lr_embedding=1e-4))
    assert set_learning_rates(optimizer, 0.5) == {
        "in": 5e-3,
        "out": 1e-2,
        "embedding in": 5e-5,
        "embedding out": 5e-5,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_embedding": 1e-4}, "optimizer.lr_embedding is 0.0001, but this run changes no token embedding"),
        ({"lr_prompt": 0.3}, "optimizer.lr_prompt is 0.3, but this run trains no prompt; leave it out"),
    ],
)
def test_a_rate_that_nothing_would_take_is_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parameter_groups(adapter("lora", rank=2).named(), OptimizerSettings(**settings))
    only = nn.Sequential(nn.Embedding(7, 4))
    on = attach(only, config_from("lora", {"rank": 2}), r"0").named()
    with pytest.raises(ConfigError, match=r'no "out" factors that would take it'):
        parameter_groups(on, OptimizerSettings(lr_ratio=2, lr_embedding=1e-4))
