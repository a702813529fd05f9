"""Parts add up, follow the recipe, and are compared with what there is."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from veneer.methods.base import METHODS
from veneer.plan.activation_trace import Step
from veneer.plan.memory import (
    IN_CACHE,
    Estimate,
    Room,
    _holes,
    _passes,
    certainly_too_large,
    estimate,
    room_for,
    verdict,
)
from veneer.recipe.settings import Recipe
from veneer.train.job import order_of_steps, read_job

Make = Callable[..., Recipe]
MIB = 2**20


def foreseen(recipe: Recipe) -> Estimate:
    rows = read_job(recipe)
    order = order_of_steps([len(e) for e in rows.examples], recipe.train, packing=recipe.data.packing)
    return estimate(recipe, rows, order, runtime=100 * MIB)


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
    plain, eight, at_once, paged = (
        foreseen(recipe(**c))
        for c in ({}, {"optimizer.bits": 8}, {"optimizer.in_backward": True}, {"optimizer.paged": True})
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
    passes = _passes(Step(kept=1000, forward=10, head=300, block=50), 4, (0.27, 0.5))
    alive = {name: sum(n for part, n in parts.items() if "holes" not in part) for name, parts in passes.items()}
    assert alive == {"forward pass": 1010, "head": 1300, "backward pass": 1050}
    assert passes["forward pass"]["holes in the heap"] == 270 + 0.5 * 4 * 10
    most = _passes(Step(0, 100 * MIB, 0, 0), 30, (0.27, 0.5))["forward pass"]["holes in the heap"]
    assert most == 280 * MIB
    one, other = (_passes(Step(1000, 10, 300, 50), blocks, (0.27, 0.5)) for blocks in (31, 30))
    assert one == other


def test_runs_that_give_memory_back_leave_fewer_holes(recipe: Make) -> None:
    one = {"train.micro_batch_tokens": 256, "train.clip": 0.0}
    usual, lean, scales = (
        recipe(**one, **c) for c in ({}, {"optimizer.in_backward": True}, {"method": {"name": "ia3"}})
    )
    share = [_holes(r, 256)[0] for r in (usual, lean, scales)]
    assert share[0] > 1.2 * share[1] and share[0] > 1.5 * share[2]
    found = [foreseen(r) for r in (usual, scales)]
    assert found[0].moment == found[1].moment == "forward pass"
    of_activations = [e.parts["holes in the heap"] / e.parts["activations"] for e in found]
    assert of_activations[0] > 1.5 * of_activations[1]


def test_long_rows_leave_fewer_holes(recipe: Make) -> None:
    shares = [_holes(recipe(), longest)[0] for longest in (8, 512, 768, 1024, 9000)]
    assert shares[0] == shares[1] > shares[2] > shares[3] == shares[4]
    assert shares[2] == pytest.approx((shares[1] + shares[3]) / 2)


def test_a_verdict_names_the_floor_and_the_disk() -> None:
    found = Estimate({"base": 900 * MIB, "activations": 200 * MIB}, "head", 1000 * MIB, {"adapter": 50 * MIB}, 1)
    assert verdict(found, Room(2000 * MIB, 60 * MIB, "this machine")) == []
    assert verdict(found, Room(None, 60 * MIB, "this machine")) == []
    said = verdict(found, Room(500 * MIB, 40 * MIB, "memory.budget"))
    assert said == [
        "memory: 1.07 GiB at the peak (head), but memory.budget leaves 500 MiB; below 1000 MiB nothing works",
        "disk: 50 MiB to be written, but 40 MiB are free",
    ]


@pytest.mark.parametrize(
    ("memory", "disk", "refused"), [(1100, 60, False), (1000, 60, False), (980, 60, True), (1100, 40, True)]
)
def test_only_what_lies_beyond_the_margin_is_refused(memory: int, disk: int, refused: bool) -> None:
    found = Estimate({"base": 1100 * MIB}, "head", 900 * MIB, {"adapter": 50 * MIB}, 1)
    assert certainly_too_large(found, Room(memory * MIB, disk * MIB, "this machine")) is refused


def test_the_smaller_of_budget_and_machine_counts(recipe: Make) -> None:
    budget = recipe(**{"memory.budget": "2GiB"})
    assert room_for(budget, available=lambda: 5 * 2**30).memory == 2 * 2**30
    assert room_for(budget, available=lambda: None).memory == 2 * 2**30
    room = room_for(recipe(**{"memory.budget": "64GiB"}), available=lambda: 5 * 2**30)
    assert room.memory is not None and 5 * 2**30 < room.memory < 64 * 2**30
    assert room.source == "memory.budget is 64 GiB, but this machine"
    room = room_for(recipe(), available=lambda: 5 * 2**30)
    assert room.memory is not None and room.memory > 5 * 2**30  # with what this process holds
    assert room_for(recipe(), available=lambda: None).memory is None


def test_a_cache_on_another_disk_has_room_of_its_own(recipe: Make, monkeypatch: Any) -> None:
    assert room_for(recipe()).cache is None
    monkeypatch.setenv("VENEER_CACHE", "/proc/cache")  # a file system of its own wherever tests run
    assert room_for(recipe()).cache == shutil.disk_usage("/proc").free
    monkeypatch.setenv("VENEER_CACHE", "/elsewhere")
    found = Estimate({}, "head", 0, {"adapter": 50 * MIB, IN_CACHE[0]: 400 * MIB, IN_CACHE[1]: 400 * MIB}, 1)
    assert verdict(found, Room(None, 60 * MIB, "this machine", 900 * MIB)) == []
    small = Room(None, 40 * MIB, "this machine", 700 * MIB)
    assert certainly_too_large(found, small)
    assert verdict(found, small) == [
        "disk: 50 MiB to be written to the run, but 40 MiB are free there",
        "disk: 800 MiB to be written to the cache /elsewhere, but 700 MiB are free there; set VENEER_CACHE to a "
        "folder with more room",
    ]


def test_weights_to_be_paged_lie_twice_on_the_disk_while_they_are_quantized(recipe: Make) -> None:
    storage, lean = {"name": "nf4", "double_quant": False}, {"train.recompute": True}
    kept = foreseen(recipe(storage=storage, **lean)).disk
    paged = foreseen(recipe(storage=storage, **lean, **{"memory.page_weights": True})).disk
    assert IN_CACHE[1] not in kept and paged[IN_CACHE[1]] == paged[IN_CACHE[0]] == kept[IN_CACHE[0]]


def test_a_budget_that_is_no_size_is_refused(recipe: Make) -> None:
    with pytest.raises(Exception, match="'much' is not a size; write it like 8GiB"):
        recipe(**{"memory.budget": "much"})


def test_runtime_is_this_process(recipe: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr("veneer.machine.rss_bytes", lambda: 7 * MIB)
    rows = read_job(recipe())
    assert estimate(recipe(), rows, [[[0]]]).parts["runtime"] == 7 * MIB
