"""One optimizer step against the gradient of plain autograd, and what it refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import prepared
from veneer.data.example import Example
from veneer.errors import TrainingError
from veneer.recipe.settings import Recipe
from veneer.train.checkpoint import TrainState
from veneer.train.optim import build_optimizer
from veneer.train.setup import Training
from veneer.train.step import optimizer_step

Make = Callable[..., Recipe]
METHOD = {"name": "lora", "rank": 4, "init": "random"}


def begun(recipe: Recipe) -> tuple[Training, TrainState]:
    torch.manual_seed(0)
    job = prepared(recipe)
    return job, TrainState(job.base, job.adapter, build_optimizer(job.adapter.named(), recipe.optimizer))


def gradient(model: Any, examples: list[Example], parameters: list[nn.Parameter]) -> tuple[float, list[Tensor]]:
    """Mean loss a supervised token and its gradient, one document at a time."""
    total, count = torch.zeros(()), 0
    for e in examples:
        ids, mask = torch.from_numpy(e.tokens.astype(np.int64)), torch.from_numpy(e.supervised)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum")
        count += int(mask.sum())
    return float(total.detach()) / count, list(torch.autograd.grad(total / count, parameters))


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_sum_to_the_gradient_of_the_whole_step(job: Make, packing: bool) -> None:
    recipe = job(**{"method": METHOD, "train.clip": 0, "data.packing": packing})
    ready, state = begun(recipe)
    assert len(ready.job.steps[0]) > 1
    parameters = ready.adapter.parameters()
    members = [ready.job.examples[i] for micro in ready.job.steps[0] for i in micro]
    loss, want = gradient(ready.base.network, members, parameters)
    figures = optimizer_step(ready, state)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    norm = float(torch.cat([g.flatten() for g in want]).norm())
    assert figures["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    for p, g in zip(parameters, want, strict=True):
        assert (p.grad - g).abs().max() < 1e-4 * norm
    assert state.step == 1
    assert figures["tokens"] == state.tokens == sum(map(len, members))
    assert figures["supervised"] == sum(int(e.supervised.sum()) for e in members)
    assert figures["tokens_per_second"] == pytest.approx(figures["tokens"] / figures["seconds"])
    assert figures["rss_bytes"] > 10**7


def test_the_gradient_is_clipped_to_its_limit(job: Make) -> None:
    recipe = job(**{"method": METHOD, "train.clip": 1e-3})
    ready, state = begun(recipe)
    assert optimizer_step(ready, state)["gradient_norm"] > 1e-2  # told as it was
    clipped = torch.cat([p.grad.flatten() for p in ready.adapter.parameters()]).norm()
    assert float(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_the_rate_follows_the_schedule(job: Make) -> None:
    recipe = job(**{"optimizer.lr_ratio": 8.0, "train.warmup": 2, "train.schedule": "linear", "train.steps": 4})
    ready, state = begun(recipe)
    rates = [optimizer_step(ready, state)["lr"] for _ in range(4)]
    assert [r["in"] for r in rates] == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert [r["out"] for r in rates] == pytest.approx([0.04, 0.08, 0.08, 0.04])


def test_every_parameter_is_reached_and_the_base_is_not_touched(job: Make) -> None:
    recipe = job(method=METHOD)
    ready, state = begun(recipe)
    base = {k: v.clone() for k, v in ready.base.network.state_dict().items()}
    before = [p.detach().clone() for p in ready.adapter.parameters()]
    for _ in range(3):
        optimizer_step(ready, state)
    assert all(torch.equal(v, base[k]) for k, v in ready.base.network.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(before, ready.adapter.parameters(), strict=True))
    assert all(p.grad is None for p in ready.base.network.parameters())


def test_a_loss_that_is_not_finite_names_its_rows_and_changes_nothing(job: Make) -> None:
    recipe = job(method=METHOD)
    ready, state = begun(recipe)
    bad = ready.job.examples[ready.job.steps[0][-1][0]]
    head, plain = ready.base.network.get_output_embeddings(), ready.base.network.get_input_embeddings().weight
    with torch.no_grad():  # a word only this row has
        ready.base.network.get_input_embeddings().weight = nn.Parameter(plain.clone(), requires_grad=False)
        ready.base.network.get_input_embeddings().weight[383] = float("nan")
    head.weight = plain
    bad.tokens[0] = 383
    before = [p.detach().clone() for p in ready.adapter.parameters()]
    with pytest.raises(TrainingError) as caught:
        optimizer_step(ready, state)
    message = str(caught.value)
    assert message.startswith("step 1: the loss is nan, in a micro-batch of the rows ")
    members = [ready.job.examples[i] for i in ready.job.steps[0][-1]][:8]
    assert all(f"{e.source}:{e.line}" in message for e in members)
    assert f"{bad.source}:{bad.line}" in message
    assert all(torch.equal(a, b) for a, b in zip(before, ready.adapter.parameters(), strict=True))
    assert state.step == 0


def test_a_gradient_that_is_not_finite_changes_nothing(job: Make) -> None:
    recipe = job(**{"method": METHOD, "train.clip": 0})
    ready, state = begun(recipe)
    first = ready.adapter.parameters()[0]
    first.register_hook(lambda g: g * float("inf"))
    before = first.detach().clone()
    with pytest.raises(TrainingError, match=r"step 1: the gradient's norm is (inf|nan); try a lower optimizer.lr"):
        optimizer_step(ready, state)
    assert torch.equal(first, before)


def test_a_parameter_the_loss_does_not_reach_is_named(job: Make) -> None:
    recipe = job(method=METHOD)
    ready, state = begun(recipe)
    ready.base.network.model.layers[1].mlp.forward = lambda x: torch.zeros_like(x)
    with pytest.raises(
        TrainingError,
        match=r"6 of 28 parameters get no gradient.*model.layers.1.mlp.gate_proj a, .*leave those modules out",
    ):
        optimizer_step(ready, state)
