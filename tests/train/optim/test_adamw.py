"""AdamW against the algorithm of its paper, written out in NumPy."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from veneer.adapters.part import NamedParameter
from veneer.errors import ConfigError, TrainingError
from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim import OPTIMIZERS, build_optimizer
from veneer.train.optim.adamw import BETAS, FlatAdamW
from veneer.train.optim.param_groups import parameter_groups


def by_the_paper(w: Any, gradients: list[Any], lr: float, betas: tuple[float, float], eps: float, decay: float) -> Any:
    """Algorithm 2 of arXiv:1711.05101, float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)
    return w


def test_it_is_the_papers() -> None:
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=(3, 5)), [rng.normal(size=(3, 5)) for _ in range(7)]
    parameter = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    settings = OptimizerSettings(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer([NamedParameter("layer", "a", "in", parameter)], settings)
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    want = by_the_paper(w, gradients, 0.03, (0.8, 0.95), 1e-3, 0.2)
    assert np.abs(parameter.detach().numpy() - want).max() < 1e-5


def test_its_state_is_float32() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer([NamedParameter("layer", "a", "in", parameter)], OptimizerSettings())
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert {t.dtype for t in optimizer.state[parameter].values()} == {torch.float32}
    assert set(OPTIMIZERS) == {"adamw", "lion", "sgd", "adafactor"}


def shapes() -> list[NamedParameter]:
    torch.manual_seed(0)
    sizes = [("a", "in", (8, 64)), ("b", "out", (100, 8)), ("s", "scale", (100,))]
    return [NamedParameter("layer", name, role, nn.Parameter(torch.randn(size))) for name, role, size in sizes]  # type: ignore[arg-type]


def run(optimizer: torch.optim.Optimizer, named: list[NamedParameter], steps: int, seed: int = 1) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for n in named:
            n.parameter.grad = torch.randn(n.parameter.shape, generator=rng)
        optimizer.step()


SETTINGS = OptimizerSettings(lr=1e-2, lr_ratio=4, weight_decay=0.1)


def test_one_buffer_steps_like_torchs_own_over_tensors() -> None:
    ours, theirs = shapes(), shapes()
    groups = parameter_groups(theirs, SETTINGS)
    run(build_optimizer(ours, SETTINGS), ours, 5)
    run(torch.optim.AdamW(groups, betas=BETAS, eps=SETTINGS.eps, fused=True), theirs, 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.parameter, b.parameter, rtol=1e-6, atol=1e-7)


def test_its_state_goes_on_in_torchs_own_and_back() -> None:
    ours, theirs, again = shapes(), shapes(), shapes()
    optimizer = build_optimizer(ours, SETTINGS)
    run(optimizer, ours, 3)
    for a, b, c in zip(ours, theirs, again, strict=True):
        b.parameter.data.copy_(a.parameter)
        c.parameter.data.copy_(a.parameter)
    peer = torch.optim.AdamW(parameter_groups(theirs, SETTINGS), betas=BETAS, eps=SETTINGS.eps, fused=True)
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = build_optimizer(again, SETTINGS)
    back.load_state_dict(copy.deepcopy(peer.state_dict()))
    for o, named in ((optimizer, ours), (peer, theirs), (back, again)):
        run(o, named, 3, seed=2)
    for a, b, c in zip(ours, theirs, again, strict=True):
        torch.testing.assert_close(a.parameter, b.parameter, rtol=1e-6, atol=1e-7)
        assert torch.equal(a.parameter, c.parameter)


def test_a_state_of_other_parameters_is_refused() -> None:
    ours, others = shapes(), shapes()[:2]
    optimizer, other = build_optimizer(ours, SETTINGS), build_optimizer(others, SETTINGS)
    run(other, others, 1)
    with pytest.raises(TrainingError, match=r"of other parameters; these differ: 2.exp_avg, 2.exp_avg_sq, 2.step"):
        optimizer.load_state_dict(other.state_dict())


EIGHT = SETTINGS.model_copy(update={"bits": 8})


def test_8_bits_follow_32_bits_and_take_two_bytes() -> None:
    ours, exact = shapes(), shapes()
    optimizer = build_optimizer(ours, EIGHT)
    assert isinstance(optimizer, FlatAdamW)
    before = [n.parameter.detach().clone() for n in ours]
    run(optimizer, ours, 10)
    run(build_optimizer(exact, SETTINGS), exact, 10)
    for a, b, start in zip(ours, exact, before, strict=True):
        assert 0 < (b.parameter - start).abs().mean() > 15 * (a.parameter - b.parameter).abs().mean()
    assert torch.equal(ours[2].parameter, exact[2].parameter), "a scale keeps 32 bits"
    large = build_optimizer(
        [NamedParameter("layer", "a", "in", nn.Parameter(torch.zeros(100, 256)))], OptimizerSettings(bits=8)
    )
    assert isinstance(large, FlatAdamW)
    assert large.state_bytes() / 25600 == 2 + 8 / 256


def test_8_bit_state_goes_on_in_bitsandbytes_and_back() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    ours, theirs, again = shapes(), shapes(), shapes()
    optimizer = build_optimizer(ours, EIGHT)
    run(optimizer, ours, 3)
    for a, b, c in zip(ours, theirs, again, strict=True):
        b.parameter.data.copy_(a.parameter)
        c.parameter.data.copy_(a.parameter)
    peer = optim.AdamW8bit(parameter_groups(theirs, EIGHT), betas=BETAS, eps=EIGHT.eps, min_8bit_size=1)
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = build_optimizer(again, EIGHT)
    back.load_state_dict(copy.deepcopy(peer.state_dict()))
    for a, c in zip(ours, again, strict=True):
        own, loaded = optimizer.state[a.parameter], back.state[c.parameter]
        assert own.keys() == loaded.keys()
        assert all(torch.equal(own[key], loaded[key]) for key in own)
    run(optimizer, ours, 1, seed=2)
    run(peer, theirs, 1, seed=2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.parameter, b.parameter, rtol=1e-4, atol=1e-5)
    fresh = optim.AdamW8bit(parameter_groups(theirs, EIGHT), betas=BETAS, eps=EIGHT.eps)  # small: 32 bits there
    run(fresh, theirs, 2)
    back.load_state_dict(copy.deepcopy(fresh.state_dict()))
    assert int(back.state[again[0].parameter]["step"]) == 2
    wanted = fresh.state[theirs[0].parameter]["state1"]
    assert isinstance(back, FlatAdamW)
    assert (back.moments(again[0].parameter)["state1"] - wanted).abs().max() < 0.01 * wanted.abs().max()


@pytest.mark.parametrize("settings", [SETTINGS, EIGHT], ids=["32 bits", "8 bits"])
def test_moments_that_became_zero_leave_the_others(settings: OptimizerSettings) -> None:
    ours = shapes()
    optimizer = build_optimizer(ours, settings)
    run(optimizer, ours, 2)
    assert isinstance(optimizer, FlatAdamW)
    for n in ours:
        before = optimizer.moments(n.parameter)
        kept = torch.rand(n.parameter.shape) < 0.3
        optimizer.put_moments_(n.parameter, {k: v * kept for k, v in before.items()})
        for k, v in optimizer.moments(n.parameter).items():
            assert torch.equal(v, before[k] * kept)
        optimizer.put_moments_(n.parameter, {k: v * 2 for k, v in before.items()})
        for k, v in optimizer.moments(n.parameter).items():
            limit = 0.0 if settings.bits == 32 else 0.015 * float(v.abs().max())
            assert (v - before[k] * 2).abs().max() <= limit, "quantized anew"
    run(optimizer, ours, 1)


def test_8_bits_that_nothing_would_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.bits is 8.*only scale parameters.*leave it at 32"):
        build_optimizer(
            [NamedParameter("layer", "s", "scale", nn.Parameter(torch.zeros(3)))], OptimizerSettings(bits=8)
        )


def test_other_levels_are_refused() -> None:
    ours = shapes()
    optimizer = build_optimizer(ours, EIGHT)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["qmap1"] += 1e-3
    with pytest.raises(TrainingError, match=r"these differ: 0.qmap1"):
        optimizer.load_state_dict(state)
