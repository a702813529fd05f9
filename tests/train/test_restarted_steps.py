"""Restarts step by step against the papers' algorithms, on a linear problem small enough to do them in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.methods.layers import linear, rows
from tests.oracles import mora as maps
from tests.oracles import restarts as oracle
from veneer.adapters.attach import attach
from veneer.methods.base import config_from
from veneer.recipe.load import recipe_from
from veneer.train.optim import build_optimizer
from veneer.train.optim.param_groups import set_learning_rates
from veneer.train.restarts import Restarts, restart_steps
from veneer.train.schedule import multiplier

INS, OUTS, STEPS, FIRST, EVERY, WARMUP, REWARM = 13, 9, 16, 5, 4, 3, 2
LR, DECAY, FLOOR = 0.03, 0.1, 0.1


def problem() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of each step, of one linear map that is not the layer's."""
    goal = rows(OUTS, INS, seed=7)
    return [(x, x @ goal.T) for x in (rows(20, INS, seed=100 + t) for t in range(STEPS))]


def trained(method: dict[str, Any], **restarts: Any) -> tuple[list[float], list[np.ndarray], list[np.ndarray]]:
    """Losses before and folded weights after each step, and what A began with in each cycle."""
    name = method["name"]
    settings = {"first": FIRST, "every": EVERY, "warmup": REWARM, **restarts}
    tree = {"model": "m", "run": "r", "data": {"train": "x"}, "method": method, "restarts": settings}
    rates = {"steps": STEPS, "warmup": WARMUP, "schedule": "cosine", "floor": FLOOR}
    recipe = recipe_from(tree | {"optimizer": {"lr": LR, "weight_decay": DECAY}, "train": rates})
    net = nn.Sequential(linear(INS, OUTS, bias=False))
    w = net[0].weight.detach().clone()
    adapter = attach(net, config_from(name, {k: v for k, v in method.items() if k != "name"}), ("0",))
    delta: Any = adapter.deltas["0"]
    optimizer = build_optimizer(adapter.named(), recipe.optimizer)
    losses, weights, starts = [], [], [delta.a.detach().numpy().copy()] if name == "lora" else []
    due = Restarts(recipe, adapter, STEPS)
    with due.folded():
        for step, (x, y) in enumerate(problem()):
            if due.due(step):
                due.restart_(optimizer, step)
                starts += [delta.a.detach().numpy().copy()] if name == "lora" else []
            at = restart_steps(recipe.restarts, STEPS)
            scale = multiplier(step, **rates, restarts=at, rewarm=recipe.restarts.warmup_steps)
            set_learning_rates(optimizer, scale)
            optimizer.zero_grad()
            loss = (net(x) - y).square().sum() / len(x)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            weights.append(delta.fold(w).detach().numpy().copy())
    assert torch.equal(net[0].weight, w)
    return losses, weights, starts


def want(cycles: list[Any], reset: str, keep: float) -> tuple[list[float], list[np.ndarray]]:
    w = linear(INS, OUTS, bias=False).weight.detach().double().numpy()
    data = [(x.double().numpy(), y.double().numpy()) for x, y in problem()]
    at = list(range(FIRST, STEPS, EVERY))
    assert len(cycles) == len(at) + 1
    found: tuple[list[float], list[np.ndarray]] = oracle.run(
        w,
        data,
        cycles,
        at,
        lambda t: oracle.jagged_cosine(t, STEPS, WARMUP, at, REWARM, FLOOR),
        LR,
        0.9,
        0.999,
        1e-8,
        DECAY,
        reset,
        keep,
    )
    return found


def same(mine: tuple[list[float], list[np.ndarray]], theirs: tuple[list[float], list[np.ndarray]]) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=2e-5)
    for step, (a, b) in enumerate(zip(mine[1], theirs[1], strict=True)):
        assert np.abs(a - b).max() < 2e-5, f"step {step}"


@pytest.mark.parametrize("fold", ["weight", "beside"])
@pytest.mark.parametrize(("reset", "keep"), [("zero", None), ("magnitude", 0.3), ("none", None)])
def test_relora(reset: str, keep: float | None, fold: str) -> None:
    more = {"reset": reset, "fold": fold, **({} if keep is None else {"keep": keep})}
    losses, weights, starts = trained({"name": "lora", "rank": 2, "alpha": 3.0}, **more)
    for a in starts:
        assert np.abs(a).max() <= INS**-0.5 and a.std() > 0.3 * INS**-0.5
    assert len({a.tobytes() for a in starts}) == len(starts)
    theirs = want([oracle.LowRank(a.astype(np.float64), OUTS, 1.5) for a in starts], reset, keep or 0)
    same((losses, weights), theirs)


@pytest.mark.parametrize("fold", ["weight", "beside"])
@pytest.mark.parametrize("groupings", [2, 4])
def test_remora(groupings: int, fold: str) -> None:
    losses, weights, _ = trained(
        {"name": "mora", "variant": "sharing", "rank": 1, "groupings": groupings}, reset="zero", fold=fold
    )
    side = maps.r_hat(INS, OUTS, 1, even=False)
    c = maps.strided_sum(INS, side), maps.adjacent(INS, side)
    e = maps.strided_copy(OUTS, side), maps.adjacent(OUTS, side).T
    one, two, three, four = ((c[0], e[0]), (c[1], e[1]), (c[1], e[0]), (c[0], e[1]))  # inputs, outputs; 0 is strided
    kinds = [one, two, three, four] if groupings == 4 else [one, two, one, two]
    same((losses, weights), want([oracle.Square(*kind) for kind in kinds], "zero", 0))


def test_the_rate_is_the_papers_jagged_cosine() -> None:
    at = [10, 30]
    for t in range(40):
        mine = multiplier(t, steps=40, warmup=4, schedule="cosine", floor=0.1, restarts=at, rewarm=5)
        assert mine == pytest.approx(oracle.jagged_cosine(t, 40, 4, at, 5, 0.1), abs=1e-12)
