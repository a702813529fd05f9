"""What evaluation and saving take, against a process that evaluates and saves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.plan.eval_memory import copied_bytes, evaluations
from veneer.plan.memory import Estimate, estimate
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import Recipe
from veneer.train.job import order_of_steps, read_job
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
CHILD = """
import json, sys
import torch
from veneer import machine
from veneer.plan.memory import estimate
from veneer.recipe.load import recipe_from
from veneer.train.job import read_job
from veneer.train.run import open_run
from veneer.train.setup import set_up

torch.set_num_threads(1)
with open_run(recipe_from(json.loads(sys.argv[1]))) as session:
    job = read_job(session.recipe)
    found = estimate(session.recipe, job, job.steps)
    session.train(set_up(job))
print(json.dumps({"moment": found.moment, "parts": found.parts, "peak": machine.peak_rss_bytes()}))
"""


def measured(
    made_model: Callable[..., Path], folder: Path, eval_words: int, hidden: int = 512, **more: Any
) -> dict[str, Any]:
    """Of a training in a process whose C library leaves no holes: it maps and gives back all that is large."""
    model = made_model(
        folder / "model",
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        vocab_size=8000,
    )
    for name, words in {"rows": 5, "held-out": eval_words}.items():
        (folder / f"{name}.jsonl").write_text((json.dumps({"text": "order " * words}) + "\n") * 2)
    data = {"train": str(folder / "rows.jsonl"), "eval": str(folder / "held-out.jsonl")}
    tree = {"model": str(model), "run": str(folder / "run"), "data": data, **more}
    tree["train"] = {"max_length": 4000, "dtype": "float32", "tokens_per_step": 64, **more.get("train", {})}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(tree)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_long_held_out_rows_are_the_peak(made_model: Callable[..., Path], tmp_path: Path) -> None:
    found = measured(made_model, tmp_path, 900, train={"steps": 1})
    assert found["moment"] == "evaluation"
    parts = found["parts"]
    assert sum(parts.values()) - parts["holes in the heap"] == pytest.approx(found["peak"], rel=0.06)
    assert parts["activations"] > 0.1 * found["peak"]


def test_an_adapter_that_is_made_anew_to_be_written_is_the_peak(
    made_model: Callable[..., Path], tmp_path: Path
) -> None:
    restarted = {"method": {"name": "lora", "rank": 256}, "restarts": {"every": 1}}
    found = measured(made_model, tmp_path, 5, **restarted, train={"steps": 5, "warmup": 0})
    assert found["moment"] == "saving"
    assert sum(found["parts"].values()) == pytest.approx(found["peak"], rel=0.06)
    assert found["parts"]["copies that are saved"] > 0.1 * found["peak"]


def foreseen(recipe: Recipe) -> Estimate:
    rows = read_job(recipe)
    order = order_of_steps([len(e) for e in rows.examples], recipe.train, packing=recipe.data.packing)
    return estimate(recipe, rows, order, runtime=1)


def with_held_out(recipe: Make, words: int, **changes: Any) -> Recipe:
    data = recipe().data.model_dump()
    file = Path(recipe().run).parent / "held-out.jsonl"
    file.write_text(json.dumps({"prompt": "order " * words, "completion": "name"}) + "\n")
    return recipe(data={**data, "eval": str(file)}, **{"train.max_length": 256, **changes})


def test_short_held_out_rows_change_nothing(recipe: Make) -> None:
    plain, short, long = foreseen(recipe()), *(foreseen(with_held_out(recipe, n)) for n in (3, 240))
    assert short.parts == plain.parts and short.floor_bytes == plain.floor_bytes
    assert long.moment in ("forward pass", "evaluation") and long.floor_bytes >= plain.floor_bytes


@pytest.mark.parametrize("change", [{}, {"prompt": {"name": "prefix", "tokens": 5}}, {"data.packing": False}])
def test_evaluation_keeps_nothing_for_a_backward_pass(recipe: Make, change: dict[str, Any]) -> None:
    made = with_held_out(recipe, 200, **change)
    rows = read_job(made)
    two, ten = (evaluations(Plain.of(made), rows, blocks)[0] for blocks in (2, 10))
    assert two == ten and two.forward > 0 and two.head > 0 == two.block


@pytest.mark.parametrize(
    ("method", "restarts", "copies"),
    [
        ({"name": "lora", "rank": 2}, 0, 0),
        ({"name": "mora", "rank": 2}, 0, 1),  # both of LoRA's names hold M
        ({"name": "lora", "rank": 2}, 3, 4),  # all cycles are one LoRA of a higher rank
    ],
)
def test_what_is_made_to_be_written(recipe: Make, method: dict[str, Any], restarts: int, copies: int) -> None:
    again = {"restarts": {"every": 1}, "train.warmup": 0} if restarts else {}
    plain = Plain.of(recipe(method=method, **again))
    trained = sum(plain.trained(plain.model()))
    assert copied_bytes(plain, restarts + 1, trained) == copies * 4 * trained


@pytest.mark.parametrize(("steps", "squares"), [(2, 0), (3, 1), (4, 1)])
def test_groupings_that_come_again_are_added_to_be_written(steps: int, squares: int, recipe: Make) -> None:
    method = {"name": "mora", "rank": 2, "variant": "sharing", "groupings": 2}
    made = recipe(method=method, restarts={"every": 1}, **{"train.warmup": 0, "train.steps": steps})
    _, job = train_recipe(made)
    assert job is not None
    deltas = job.adapter.deltas.values()
    there = {t.data_ptr() for d in deltas for t in [*d.parameters(), *d.past.values()]}
    written = [t for d in deltas for t in d.tensors().values() if t.data_ptr() not in there]
    plain = Plain.of(made)
    trained = sum(plain.trained(plain.model()))
    assert copied_bytes(plain, steps, trained) == sum(t.nbytes for t in written) == squares * 4 * trained


def test_a_prompt_is_written_as_it_is(recipe: Make) -> None:
    plain = Plain.of(recipe(prompt={"name": "prompt", "tokens": 5}, method={"name": "none"}))
    assert copied_bytes(plain, 2, 160) == 0
