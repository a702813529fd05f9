"""Parts add up, follow the recipe, and are those of a process that trains, evaluates and saves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plan.checked import checked
from tests.plan.test_trace import with_held_out
from veneer.adapters.layer_view import layer_at
from veneer.methods.base import METHODS
from veneer.plan.memory import (
    IN_CACHE,
    Estimate,
    InitMemory,
    estimate,
    finished_cycles,
    folded_copies,
    init_memory,
    passes_of,
    unused_heap,
)
from veneer.plan.trace import Step
from veneer.recipe.settings import Recipe
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
MIB = 2**20


def foreseen(recipe: Recipe) -> Estimate:
    return estimate(checked(recipe), runtime=100 * MIB)


def test_parts_add_up_and_follow_the_recipe(recipe: Make) -> None:
    plain, quantized, again = (foreseen(recipe(**c)) for c in ({}, {"storage.name": "nf4"}, {"train.recompute": True}))
    assert plain.moment in ("forward pass", "head", "backward pass") and plain.peak_bytes == sum(plain.parts.values())
    assert plain.parts["gradients"] == 4 * plain.trained and plain.parts["optimizer state"] == 8 * plain.trained
    assert quantized.parts["base"] < plain.parts["base"]
    assert again.parts["activations"] < plain.parts["activations"]
    assert plain.floor_bytes < plain.peak_bytes
    assert quantized.disk["quantized base in the cache"] == quantized.parts["base"]


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("bitfit", "full")])
def test_every_method_is_foreseen(recipe: Make, method: str, storage: str) -> None:
    targets = ["q_proj", "o_proj", "down_proj"]
    found = foreseen(recipe(**{"method": {"name": method, "targets": targets}, "storage.name": storage}))
    assert found.trained > 0 and found.peak_bytes > found.floor_bytes > 0


def test_full_fine_tuning_is_foreseen(recipe: Make) -> None:
    full, lora = (foreseen(recipe(method={"name": name})) for name in ("full", "lora"))
    assert full.trained > lora.trained and full.parts["gradients"] > lora.parts["gradients"]


def test_the_optimizer_counts_as_it_is_kept(recipe: Make) -> None:
    one_micro_batch = {"train.tokens_per_step": 128, "train.micro_batch_tokens": None}
    plain, eight, at_once, paged = (
        foreseen(recipe(**c))
        for c in (
            {},
            {"optimizer.bits": 8},
            {"optimizer.in_backward": True, **one_micro_batch},
            {"optimizer.paged": True},
        )
    )
    assert eight.parts["optimizer state"] == round((2 + 8 / 256) * plain.trained)
    assert 0 < at_once.parts["gradients"] < 4 * plain.trained / 4
    assert paged.parts["optimizer state"] == 0 and paged.disk["paged optimizer state"] == 8 * plain.trained


def test_paging_moves_bytes_to_disk(recipe: Make) -> None:
    again = foreseen(recipe(**{"train.recompute": True}))
    paged = foreseen(recipe(**{"train.recompute": True, "memory.page_activations": True}))
    assert paged.disk["paged activations"] > 0 and "paged activations" not in again.disk
    assert paged.parts["activations"] <= again.parts["activations"]  # two blocks: all that is paged is in flight


def test_paged_state_is_beside_the_parts(recipe: Make) -> None:
    kept, paged = foreseen(recipe(**{"optimizer.paged": False})), foreseen(recipe(**{"optimizer.paged": True}))
    assert paged.parts["optimizer state"] == 0 and kept.droppable_bytes == 0
    assert paged.droppable_bytes == paged.disk["paged optimizer state"] == kept.parts["optimizer state"]
    assert kept.peak_bytes - paged.peak_bytes == paged.droppable_bytes


def test_files_of_paged_weights_are_beside_the_parts(recipe: Make) -> None:
    quantized = {"storage.name": "nf4", "train.recompute": True}
    kept, paged = (foreseen(recipe(**quantized, **{"memory.page_weights": p})) for p in (False, True))
    assert kept.droppable_bytes == 0 < paged.droppable_bytes < kept.parts["base"]


def test_state_is_paged_by_itself_where_it_would_take_half(recipe: Make, monkeypatch: Any) -> None:
    moments, base = foreseen(recipe()).parts["optimizer state"], foreseen(recipe()).parts["base"]
    for free, paged in ((base + 2 * moments, 0), (base + 2 * moments - 2, moments)):
        monkeypatch.setattr("veneer.machine.available_bytes", lambda free=free: free)
        assert foreseen(recipe()).droppable_bytes == paged


def test_the_passes_of_a_step_peak_one_by_one() -> None:
    passes = passes_of(Step(kept=1000, forward=10, head=300, block=50), 4, (0.27, 0.5))
    alive = {name: sum(n for part, n in parts.items() if "holes" not in part) for name, parts in passes.items()}
    assert alive == {"forward pass": 1010, "head": 1300, "backward pass": 1050}
    assert passes["forward pass"]["holes in the heap"] == 270 + 0.5 * 4 * 10
    most = passes_of(Step(0, 100 * MIB, 0, 0), 30, (0.27, 0.5))["forward pass"]["holes in the heap"]
    assert most == 280 * MIB
    one, other = (passes_of(Step(1000, 10, 300, 50), blocks, (0.27, 0.5)) for blocks in (31, 30))
    assert one == other


def test_runs_that_give_memory_back_leave_fewerunused_heap(recipe: Make) -> None:
    one = {"train.micro_batch_tokens": 256, "train.clip": 0.0}
    usual, lean, scales = (
        recipe(**one, **c) for c in ({}, {"optimizer.in_backward": True}, {"method": {"name": "ia3"}})
    )
    share = [unused_heap(r, 256)[0] for r in (usual, lean, scales)]
    assert share[0] > 1.2 * share[1] and share[0] > 1.5 * share[2]
    found = [foreseen(r) for r in (usual, scales)]
    assert found[0].moment == found[1].moment == "forward pass"
    of_activations = [e.parts["holes in the heap"] / e.parts["activations"] for e in found]
    assert of_activations[0] > 1.5 * of_activations[1]


def test_long_rows_leave_fewerunused_heap(recipe: Make) -> None:
    shares = [unused_heap(recipe(), longest)[0] for longest in (8, 512, 768, 1024, 9000)]
    assert shares[0] == shares[1] > shares[2] > shares[3] == shares[4]
    assert shares[2] == pytest.approx((shares[1] + shares[3]) / 2)


def test_weights_to_be_paged_lie_twice_on_the_disk_while_they_are_quantized(recipe: Make) -> None:
    storage, lean = {"name": "nf4", "double_quant": False}, {"train.recompute": True}
    kept = foreseen(recipe(storage=storage, **lean)).disk
    paged = foreseen(recipe(storage=storage, **lean, **{"memory.page_weights": True})).disk
    assert IN_CACHE[1] not in kept and paged[IN_CACHE[1]] == paged[IN_CACHE[0]] == kept[IN_CACHE[0]]


def test_runtime_is_this_process(recipe: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr("veneer.machine.rss_bytes", lambda: 7 * MIB)
    assert estimate(checked(recipe())).parts["runtime"] == 7 * MIB


def test_short_held_out_rows_change_nothing(recipe: Make) -> None:
    plain, short, long = foreseen(recipe()), *(foreseen(with_held_out(recipe, n)) for n in (3, 240))
    assert short.parts == plain.parts and short.floor_bytes == plain.floor_bytes
    assert long.moment in ("forward pass", "evaluation") and long.floor_bytes >= plain.floor_bytes


def test_what_is_kept_beside_the_trained_parameters(recipe: Make) -> None:
    """PiSSA's first A and B are as large as A and B."""
    pissa, lora = (checked(recipe(method={"name": "lora", "rank": 2, "init": i})) for i in ("pissa", "uniform"))
    trained = pissa.adapter.n_params()
    assert init_memory(pissa).fixed == 4 * trained and init_memory(lora).fixed == 0 == init_memory(lora).seen
    assert estimate(pissa, 0).parts["adapter"] == 8 * trained


def test_what_eva_holds_while_it_looks(recipe: Make) -> None:
    """Of each layer twice the rank of directions and 8 more, their values, the mean and the variance."""
    made = checked(recipe(method={"name": "lora", "rank": 2, "init": "eva"}))
    found = init_memory(made)
    layers = [layer_at(made.meta.network, path) for path in made.adapter.deltas]
    assert found.seen == sum(4 * (12 * layer.in_features + 12 + layer.in_features + 1) for layer in layers)
    tokens = max(sum(len(made.job.examples[i]) for i in members) for step in made.job.steps for members in step)
    rows = 4 * tokens * max(layer.in_features for layer in layers)
    assert 3 * rows < found.looking < 12 * rows


@pytest.mark.parametrize("method", ["adalora", "dora", "ia3", "bottleneck", "full"])
def test_making_a_delta_needs_memory(method: str, recipe: Make) -> None:
    assert init_memory(checked(recipe(method={"name": method}))).making > 0


def test_without_a_method_nothing_is_initialized(recipe: Make) -> None:
    made = checked(recipe(prompt={"name": "prompt", "tokens": 5}, method={"name": "none"}))
    assert init_memory(made) == InitMemory()


@pytest.mark.parametrize(
    ("method", "storage"),
    [
        ({"name": "lora"}, "dense"),
        ({"name": "dora"}, "nf4"),
        ({"name": "lora", "init": "pissa"}, "dense"),
        ({"name": "mora", "variant": "sharing", "groupings": 2}, "nf4"),
        ({"name": "mora", "variant": "sharing", "groupings": 2}, "dense"),
    ],
    ids=str,
)
def test_finished_cycles_and_copies_are_those_of_a_run(recipe: Make, method: dict[str, Any], storage: str) -> None:
    settings = {"rank": 2, **method}
    more = {"restarts": {"every": 2, "warmup": 1}, "train.steps": 8, "train.warmup": 0, "storage.name": storage}
    made = checked(recipe(method=settings, **more))
    _, job = train_recipe(made.recipe)
    assert job is not None
    assert finished_cycles(made) == sum(4 * t.numel() for d in job.adapter.deltas.values() for t in d.past.values())
    weights = [job.base.network.get_submodule(path)._parameters.get("weight") for path in job.adapter.deltas]
    assert folded_copies(made) == (sum(w.nbytes for w in weights if w is not None) if storage == "dense" else 0)


def test_without_restarts_there_are_no_cycles_and_beside_no_copies(recipe: Make) -> None:
    plain = checked(recipe())
    assert finished_cycles(plain) == folded_copies(plain) == 0
    beside = checked(recipe(restarts={"every": 2, "fold": "beside"}, **{"train.steps": 3, "train.warmup": 0}))
    assert finished_cycles(beside) == 4 * beside.adapter.n_params() and folded_copies(beside) == 0


CHILD = """
import json, sys
import torch
from veneer import machine
from veneer.plan.memory import estimate
from veneer.recipe.load import recipe_from
from veneer.train.job import read_job
from veneer.train.preflight import preflight
from veneer.train.run import open_run
from veneer.train.setup import set_up

torch.set_num_threads(1)
with open_run(recipe_from(json.loads(sys.argv[1]))) as session:
    checked = preflight(read_job(session.recipe))
    found = estimate(checked)
    told = {"moment": found.moment, "parts": found.parts}
    session.train(set_up(checked))
print(json.dumps({**told, "peak": machine.peak_rss_bytes()}))
"""


def measured(
    made_model: Callable[..., Path], folder: Path, eval_words: int, hidden: int = 512, **more: Any
) -> dict[str, Any]:
    """Train in a process whose C library leaves no unused heap: it maps every large block and gives it back."""
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


def test_a_decomposition_is_the_peak(made_model: Callable[..., Path], tmp_path: Path) -> None:
    method = {"name": "lora", "init": "pissa", "rank": 1, "targets": "model.layers.0.mlp.down_proj"}
    made = {"method": method, "storage": {"name": "nf4"}, "train": {"steps": 1}}
    found = measured(made_model, tmp_path, 5, hidden=1280, **made)
    assert found["moment"] == "beginning"
    assert sum(found["parts"].values()) == pytest.approx(found["peak"], rel=0.06)
    assert found["parts"]["first values of one layer"] > 0.1 * found["peak"]
