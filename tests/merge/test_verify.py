"""Drift against its definition in NumPy, one row and one position at a time, and against models known to differ."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.methods.parity import fresh
from veneer.base.base import Base
from veneer.merge.verify import Drift, compare, logits_along


def of_numpy(first: list[Tensor], second: list[Tensor]) -> dict[str, float]:
    """The definition, in float64; imports nothing of ours."""
    a, b = ([t.double().numpy() for t in side] for side in (first, second))
    centered = [[r - np.mean(r, axis=1, keepdims=True) for r in side] for side in (a, b)]
    typical = [
        np.sqrt(np.mean((u - v) ** 2)) for x, y in zip(*centered, strict=True) for u, v in zip(x, y, strict=True)
    ]
    same = ties = 0
    for x, y in zip(a, b, strict=True):
        parts = [t for t in range(len(x)) if int(np.argmax(x[t])) != int(np.argmax(y[t]))]
        if not parts:
            same += 1
            continue
        second_best, best = np.sort(x[parts[0]])[-2:]
        ties += bool(best - second_best <= 25 * np.median(typical))
    apart = math.sqrt(sum(float(np.sum((x - y) ** 2)) for x, y in zip(*centered, strict=True)))
    return {
        "rows": len(a),
        "max_drift": max(float(np.max(np.abs(x - y))) for x, y in zip(a, b, strict=True)),
        "relative_drift": apart / math.sqrt(sum(float(np.sum(x**2)) for x in centered[0])),
        "greedy_agreement": same / len(a),
        "near_ties": ties,
    }


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    words=st.integers(2, 9),
    spread=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_drift_is_its_definition(lengths: list[int], words: int, spread: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    first = [torch.empty(n, words).normal_(generator=rng) * 3 for n in lengths]
    second = [x + spread * torch.empty(x.shape).normal_(generator=rng) for x in first]
    found, want = compare(first, second), of_numpy(first, second)
    assert vars(found) == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert 0 <= found.parted <= found.rows
    assert found.parted + found.near_ties + round(found.greedy_agreement * found.rows) == found.rows


def rows(*values: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


def test_a_shift_of_all_logits_is_no_relative_drift() -> None:
    first = rows([[0.0, 1.0, 4.0], [2.0, 0.0, 1.0]])
    drift = compare(first, [first[0] + 5])
    assert drift.max_drift == 5 and drift.relative_drift < 1e-6 and drift.greedy_agreement == 1.0


def noisy(spread: float, *changes: tuple[int, int, list[float]]) -> tuple[list[Tensor], list[Tensor]]:
    """Four rows of three clear choices among six words; noise of exactly `spread`; and other choices where asked."""
    first = [torch.tensor([[9.0, 0, 0, 0, 0, 0]] * 3) for _ in range(4)]
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1])
    second = [x + spread * sign for x in first]
    for row, position, logits in changes:
        second[row][position] = torch.tensor(logits)
    return first, second


def test_a_text_that_parts_clearly_is_no_near_tie() -> None:
    turned = [4.0, 5.0, 0, 0, 0, 0]
    clear = compare(*noisy(0.35, (2, 1, turned)))
    assert (clear.greedy_agreement, clear.near_ties, clear.parted) == (0.75, 0, 1), "9 is above 25 x 0.35"
    rounding = compare(*noisy(0.4, (2, 1, turned)))
    assert (rounding.greedy_agreement, rounding.near_ties, rounding.parted) == (0.75, 1, 0), "9 is below 25 x 0.4"


def test_damage_at_one_position_does_not_excuse_itself() -> None:
    broken = [-500.0, 500, -500, 500, -500, 500]
    assert compare(*noisy(0.1, (0, 0, broken))).parted == 1


def test_only_the_first_parting_counts() -> None:
    first, second = noisy(0.1, (1, 0, [8.0, 9, 0, 0, 0, 0]), (1, 2, [0.0, 9, 0, 0, 0, 0]))
    first[1][0] = torch.tensor([9.0, 8.9, 0, 0, 0, 0])
    found = compare(first, second)
    assert (found.near_ties, found.parted) == (1, 0), "after a near tie the texts go different ways anyhow"


@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_are_none_are_drift(side: int) -> None:
    pair = [rows([[0.0, 1.0]], [[0.0, 2.0]]), rows([[0.0, 1.0]], [[0.0, 2.0]])]
    pair[side][0][0, 0] = float("nan")
    drift = compare(*pair)
    assert math.isnan(drift.relative_drift) and math.isnan(drift.max_drift)


def test_a_model_that_says_nothing() -> None:
    nothing = rows([[0.0, 0.0]])
    assert compare(nothing, nothing).relative_drift == 0.0
    assert compare(nothing, rows([[0.0, 1.0]])).relative_drift == math.inf


def test_parted_counts_whole_rows() -> None:
    for rows_ in range(1, 200):
        for same in range(rows_ + 1):
            assert Drift(rows_, 0.0, 0.0, same / rows_, rows_ - same).parted == 0


PROMPTS = [[5, 9, 300, 17], [1, 7], [250]]
CONTINUATIONS: list[list[int]] = [[2, 81], [33, 100, 12], []]


def want_along(model: Any) -> list[Tensor]:
    """One forward pass for each token that is chosen."""
    found = []
    for prompt, more in zip(PROMPTS, CONTINUATIONS, strict=True):
        steps = [model(torch.tensor([prompt + more[:n]])).logits[0, -1] for n in range(len(more) + 1)]
        found.append(torch.stack(steps))
    return found


@torch.no_grad()
def test_logits_are_those_that_choose_each_next_token(tiny_model: Path) -> None:
    model = fresh(tiny_model)
    found, want = logits_along(Base.of(model), PROMPTS, CONTINUATIONS), want_along(model)
    assert [x.shape for x in found] == [x.shape for x in want] == [(3, 384), (4, 384), (1, 384)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, want, strict=True))


@torch.no_grad()
def test_a_model_that_gives_the_logits_of_all_positions_only(tiny_model: Path) -> None:
    model = fresh(tiny_model)

    class Older(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            assert not use_cache
            return self.inner(input_ids)

    found = logits_along(Base(Older()), PROMPTS, CONTINUATIONS)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, want_along(model), strict=True))


def test_lower_precision_is_compared_in_float32(tiny_model: Path) -> None:
    found = logits_along(Base.of(fresh(tiny_model).bfloat16()), PROMPTS, CONTINUATIONS)
    assert {x.dtype for x in found} == {torch.float32}
    drift = compare(logits_along(Base.of(fresh(tiny_model)), PROMPTS, CONTINUATIONS), found)
    assert 1e-4 < drift.relative_drift < 0.05
