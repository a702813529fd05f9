"""The loss is the one that each example has alone, computed the plain way."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.base.base import Base
from veneer.data.render import Example
from veneer.evaluate import perplexity as room
from veneer.evaluate.perplexity import Likelihood, likelihood


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def made_examples(n: int) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(n):
        length = int(rng.integers(2, 40))
        supervised = rng.random(length) < 0.4
        supervised[0], supervised[-1] = False, True
        examples.append(Example(rng.integers(3, 384, length).astype(np.int32), supervised, "made", 1))
    return examples


def plainly(model: Any, example: Example) -> float:
    """Minus the sum of log softmax, one token after the other, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(example.tokens).long()[None]).logits[0].double().numpy()
    nats = 0.0
    for position in np.flatnonzero(example.supervised):
        before = logits[position - 1]
        top = before.max()
        nats -= before[example.tokens[position]] - top - math.log(np.exp(before - top).sum())
    return nats


@pytest.mark.parametrize(("tokens", "logits"), [(2048, 1024), (60, 40), (1, 1)])
def test_is_the_plain_loss_of_each_example(
    model: Any, tokens: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(room, "LOGIT_ROWS", logits)
    examples = made_examples(12)
    done: list[int] = []
    measured = likelihood(Base.of(model), examples, done.append)
    assert measured.nats == pytest.approx([plainly(model, e) for e in examples], abs=1e-4)
    assert measured.tokens == [int(e.supervised.sum()) for e in examples]
    assert sum(done) == 12
    assert measured.loss == pytest.approx(sum(measured.nats) / sum(measured.tokens))
    assert measured.perplexity == pytest.approx(math.exp(measured.loss))


def test_extremes() -> None:
    assert Likelihood([800.0], [1]).perplexity == math.inf
    assert Likelihood([], []).loss == 0


def test_the_training_mode_comes_back(model: Any) -> None:
    base = Base.of(model)
    model.train()
    likelihood(base, made_examples(1))
    assert model.training and model.lm_head.training
    model.eval()
