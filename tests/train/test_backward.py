"""Gradients used at once against gradients kept: the same bits, for every method, storage and prompt."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import prepared
from tests.train.test_loop import interrupted
from veneer.errors import TrainingError
from veneer.methods.base import METHODS
from veneer.recipe.settings import Recipe
from veneer.tasks import causal_lm
from veneer.train.checkpoint import TrainState
from veneer.train.optim import build_optimizer
from veneer.train.run import train_recipe
from veneer.train.setup import Training
from veneer.train.step import optimizer_step

Make = Callable[..., Recipe]
WHOLE = {"train.micro_batch_tokens": 512}
"""A step as one micro-batch."""
ON = {**WHOLE, "optimizer.in_backward": True}
LORA = {"name": "lora", "rank": 4, "dropout": 0.2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


def begun(recipe: Recipe) -> tuple[Training, TrainState]:
    torch.manual_seed(0)
    job = prepared(recipe)
    job.adapter.train()
    return job, TrainState(job.base, job.adapter, build_optimizer(job.adapter.named(), recipe.optimizer))


def stepped(recipe: Recipe, steps: int = 3) -> tuple[list[Any], list[torch.Tensor]]:
    job, state = begun(recipe)
    figures = [optimizer_step(job, state) for _ in range(steps)]
    told = [(f["loss"], f["gradient_norm"]) for f in figures]
    return told, [p.detach().clone() for p in job.adapter.parameters()] + [torch.get_rng_state()]


def same(make: Make, **changes: Any) -> None:
    told, kept = stepped(make(**{**changes, **WHOLE}))
    told_at_once, at_once = stepped(make(**{**changes, **ON}))
    assert told == told_at_once
    assert all(torch.equal(a, b) for a, b in zip(kept, at_once, strict=True))


@pytest.mark.parametrize("changes", [{"train.micro_batch_tokens": 64}, ON], ids=["kept", "at once"])
def test_a_graph_is_gone_before_the_next_forward_pass(
    job: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def hidden_states(*given: Any, **more: Any) -> torch.Tensor:
        assert not any(hidden() is not None for hidden in made)
        hidden = forward(*given, **more)
        made.append(weakref.ref(hidden))
        return hidden

    forward = causal_lm.hidden_states
    monkeypatch.setattr(causal_lm, "hidden_states", hidden_states)
    recipe = job(**changes, **{"train.clip": 1.0})
    optimizer_step(*begun(recipe))
    assert len(made) > 1


@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "adalora"])
def test_every_method_ends_with_the_same_bits(
    job: Make, made_model: Any, tmp_path: Path, method: str, clip: float
) -> None:
    model = made_model(tmp_path / "model", attention_bias=True)
    more = {"targets": ["q_proj", "o_proj"] if method == "bitfit" else ["q_proj", "o_proj", "down_proj"]}
    same(job, method={"name": method, **more}, model=str(model), **{"train.clip": clip})


@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize(
    "changes",
    [
        {"train.recompute": True},
        {"data.packing": False, "train.tokens_per_step": 1},
        {"optimizer.bits": 8, "storage": {"name": "nf4"}},
        {"optimizer.paged": True, "optimizer.lr_ratio": 4.0},
        {"prompt": {"name": "prefix", "tokens": 5}},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_it_goes_with_the_rest(job: Make, changes: dict[str, Any], clip: float) -> None:
    same(job, **{"method": LORA, "train.clip": clip, **changes})


@pytest.mark.parametrize("clip", [0, 0.05])
def test_a_head_that_is_computed_in_chunks(
    job: Make, made_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    """Its gradients come in several passes; where it is the embedding too, also from below."""
    monkeypatch.setattr("veneer.tasks.lm_loss.CHUNK_BYTES", 1)
    for tied in (False, True):
        model = made_model(tmp_path / f"model-{tied}", tie_word_embeddings=tied)
        for targets in (["lm_head"], ["lm_head", "embed_tokens", "q_proj"]):
            method = {"name": "lora", "rank": 4, "targets": targets}
            same(job, method=method, model=str(model), **{"train.clip": clip})


def test_an_interrupted_run_ends_with_the_same_bytes(job: Make) -> None:
    whole, broken = job("whole", method=LORA, **ON), job("broken", method=LORA, **ON)
    train_recipe(whole)
    interrupted(broken, 3)
    assert train_recipe(broken)[0].resumed_from == 3
    a, b = (Path(r.run, "adapter", "adapter_model.safetensors").read_bytes() for r in (whole, broken))
    assert a == b


@pytest.mark.parametrize("clip", [0, 1.0])
def test_a_loss_that_is_not_finite_changes_nothing(job: Make, clip: float) -> None:
    recipe = job(method=LORA, **{**ON, "train.clip": clip})
    ready, state = begun(recipe)
    norm = ready.base.network.model.norm
    norm.weight = nn.Parameter(torch.full_like(norm.weight, float("nan")), requires_grad=False)
    before = [p.detach().clone() for p in ready.adapter.parameters()]
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan, in a micro-batch of the rows "):
        optimizer_step(ready, state)
    assert all(torch.equal(a, b) for a, b in zip(before, ready.adapter.parameters(), strict=True))


@pytest.mark.parametrize("clip", [0, 1.0])
def test_a_parameter_the_loss_does_not_reach_is_named(job: Make, clip: float) -> None:
    recipe = job(method=LORA, **{**ON, "train.clip": clip})
    ready, state = begun(recipe)
    ready.base.network.model.layers[1].mlp.forward = lambda x: torch.zeros_like(x)
    with pytest.raises(TrainingError, match=r"6 of 28 parameters get no gradient.*model.layers.1.mlp.gate_proj a, "):
        optimizer_step(ready, state)


def test_with_a_limit_a_gradient_that_is_not_finite_changes_nothing(job: Make) -> None:
    recipe = job(method=LORA, **ON)
    ready, state = begun(recipe)
    first = ready.adapter.parameters()[0]
    first.register_hook(lambda g: g * float("inf"))  # type: ignore[no-untyped-call]
    before = [p.detach().clone() for p in ready.adapter.parameters()]
    with pytest.raises(TrainingError, match=r"step 1: the gradient's norm is (inf|nan); try a lower optimizer.lr"):
        optimizer_step(ready, state)
    assert all(torch.equal(a, b) for a, b in zip(before, ready.adapter.parameters(), strict=True))
