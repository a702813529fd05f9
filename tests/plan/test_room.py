"""An estimate is held against the room there is."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from veneer.plan.memory import IN_CACHE, Estimate
from veneer.plan.room import Room, certainly_too_large, room_for, verdict
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]
MIB = 2**20


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


def test_a_budget_that_is_no_size_is_refused(recipe: Make) -> None:
    with pytest.raises(Exception, match="'much' is not a size; write it like 8GiB"):
        recipe(**{"memory.budget": "much"})
