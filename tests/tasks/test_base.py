"""The registry of tasks, and the one held-out loss against each example computed alone in the plain way."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from veneer.base.base import Base
from veneer.data.example import Example
from veneer.errors import ConfigError
from veneer.models.attention import use_veneer_attention
from veneer.tasks import TASKS
from veneer.tasks.base import HeldOutLoss, held_out_batches
from veneer.tasks.causal_lm import CausalLM


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    use_veneer_attention(model)
    return model


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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most", [None, 64, 1])
def test_the_held_out_loss_is_the_plain_loss_of_each_example(model: Any, packed: bool, most: int | None) -> None:
    examples = made_examples(12)
    done: list[int] = []
    measured = CausalLM().held_out_loss(
        Base(model), examples, packed=packed, max_length=40, micro_batch_tokens=most, done=done.append
    )
    nats = sum(plainly(model, e) for e in examples)
    assert measured.nats == pytest.approx(nats, abs=1e-3)
    assert measured.positions == sum(int(e.supervised.sum()) for e in examples)
    assert sum(done) == 12
    assert measured.mean == pytest.approx(nats / measured.positions)
    assert measured.perplexity == pytest.approx(math.exp(nats / measured.positions))


def test_one_example_at_a_time_gives_its_own_loss(model: Any) -> None:
    for example in made_examples(3):
        measured = CausalLM().held_out_loss(Base(model), [example], packed=True, max_length=40)
        assert measured.nats == pytest.approx(plainly(model, example), abs=1e-4)


def test_networks_without_position_ids_are_measured_one_document_at_a_time() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bloom = AutoModelForCausalLM.from_config(
            BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)
        ).eval()
    examples = made_examples(3)
    CausalLM().selftest(Base(bloom), examples, packed=False)
    measured = CausalLM().held_out_loss(Base(bloom), examples, packed=False, max_length=40)
    assert measured.nats == pytest.approx(sum(plainly(bloom, e) for e in examples), abs=1e-3)


def test_extremes() -> None:
    assert HeldOutLoss(800.0, 1).perplexity == math.inf
    assert HeldOutLoss(0.0, 0).mean == 0


def test_the_training_mode_comes_back_and_no_gradient_is_kept(model: Any) -> None:
    model.train()
    before = torch.get_rng_state()
    CausalLM().held_out_loss(Base(model), made_examples(1), packed=True, max_length=40)
    assert model.training and model.lm_head.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def test_every_example_is_in_one_batch() -> None:
    examples = made_examples(12)
    batches = held_out_batches(examples, packed=True, max_length=40, micro_batch_tokens=64)
    assert sorted(i for members in batches for i in members) == list(range(12))
    assert all(sum(len(examples[i]) for i in members) <= 64 for members in batches)


def test_a_new_file_in_the_folder_is_a_task_and_a_recipe_may_name_it(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(
        "from veneer.tasks.base import TASKS\n"
        "from veneer.tasks.causal_lm import CausalLM\n\n\n"
        "@TASKS.add('echo')\n"
        "class Echo(CausalLM):\n"
        "    metrics = ('loss',)\n"
    )
    code = (
        "import sys, pathlib, importlib.util, veneer\n"
        "home = pathlib.Path(veneer.__file__).parent / 'tasks'\n"
        "spec = importlib.util.spec_from_file_location('veneer.tasks', home / '__init__.py',\n"
        f"    submodule_search_locations=[str(home), {str(tmp_path)!r}])\n"
        "package = importlib.util.module_from_spec(spec)\n"
        "sys.modules['veneer.tasks'] = package\n"
        "spec.loader.exec_module(package)\n"
        "from veneer.recipe.load import recipe_from\n"
        "tree = {'model': 'm', 'run': 'r', 'data': {'train': 'rows.jsonl'}, 'task': 'echo'}\n"
        "assert list(package.TASKS) == ['causal-lm', 'echo'] and recipe_from(tree).task == 'echo'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_task_is_refused_with_close_matches() -> None:
    with pytest.raises(
        ConfigError, match=r"there is no task 'causal_lm'. Did you mean 'causal-lm'\? Known: causal-lm."
    ):
        TASKS["causal_lm"]
