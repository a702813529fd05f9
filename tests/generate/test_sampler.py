"""Sampling draws what the probabilities say, from each row's own stream."""

import math
from collections import Counter

import pytest
import torch

from veneer.errors import ConfigError
from veneer.generate.sampler import Sampling, greedy

LOGITS = torch.tensor([[1.0, 3.0, 0.0, 2.0, -1.0]])


def nucleus(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The definition, in plain Python: likeliest first until the mass is reached, renormalized."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])[: top_k or None]
    total = sum(weights[i] for i in ranked)
    kept: list[int] = []
    while sum(weights[i] for i in kept) / total < top_p and len(kept) < len(ranked):
        kept.append(ranked[len(kept)])
    mass = sum(weights[i] for i in kept)
    return {i: weights[i] / mass for i in kept}


def test_greedy_takes_the_likeliest() -> None:
    assert greedy(torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0]]), [0, 1]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.8), (1.5, 4, 0.7), (1.0, 1, 1.0), (1.0, 0, 1e-9)],
)
def test_frequencies_follow_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    expected = nucleus(LOGITS[0].tolist(), temperature, top_k, top_p)
    n = 4000
    sampler = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    seen = Counter(sampler(LOGITS.expand(n, -1), range(n)).tolist())
    assert set(seen) <= set(expected)
    for token, p in expected.items():
        assert abs(seen[token] / n - p) < 4 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_the_nucleus_is_found_beyond_the_first_64_tokens() -> None:
    logits = torch.zeros(1, 1000)  # equal: the nucleus of 0.9 has 900 tokens
    sampler = Sampling(top_p=0.9)
    assert len(set(sampler(logits.expand(5000, -1), range(5000)).tolist())) > 800


def test_a_row_draws_from_its_own_stream() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together = Sampling(seed=1)
    first = together(logits, range(6))
    second = together(logits, range(6))
    alone = Sampling(seed=1)
    assert [int(alone(logits[i : i + 1], [i])) for i in (5, 2)] == [int(first[5]), int(first[2])]
    assert int(alone(logits[5:6], [5])) == int(second[5])


def test_settings_out_of_range_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=0, top_p=1.5, top_k=-1)
    for word in ("temperature must be above 0, got 0", "top_p must be", "got 1.5", "top_k must be", "got -1"):
        assert word in str(caught.value)
