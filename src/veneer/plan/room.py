"""How much memory and disk there is, and whether an estimate fits."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veneer import machine
from veneer.plan.memory import IN_CACHE, Estimate
from veneer.recipe.settings import Recipe
from veneer.units import format_bytes as size
from veneer.units import parse_bytes

MARGIN = 0.1
"""A run is refused only if it would not fit even with an estimate that is this share too high."""


@dataclass(frozen=True)
class Room:
    """What a run may use."""

    memory: int | None
    """Bytes of memory; None if the system does not tell."""
    disk: int
    """Free bytes where the run is written."""
    source: str
    """Where the limit on memory comes from."""
    cache: int | None = None
    """Free bytes where veneer's cache is, if that is another file system."""


def room_for(recipe: Recipe, available: Callable[[], int | None] = machine.available_bytes) -> Room:
    """The recipe's budget, but no more than this process holds and can still take."""
    run, cache = _existing(Path(recipe.run)), _existing(machine.cache_dir())
    disk = shutil.disk_usage(run).free
    apart = shutil.disk_usage(cache).free if cache.stat().st_dev != run.stat().st_dev else None
    free = available()
    here = None if free is None else free + machine.rss_bytes()
    if recipe.memory.budget is None:
        return Room(here, disk, "this machine", apart)
    budget = parse_bytes(recipe.memory.budget)
    if here is not None and here < budget:
        return Room(here, disk, f"memory.budget is {size(budget)}, but this machine", apart)
    return Room(budget, disk, "memory.budget", apart)


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())


def verdict(found: Estimate, room: Room) -> list[str]:
    """Everything that does not fit; empty if all does."""
    problems = []
    if room.memory is not None and found.peak_bytes > room.memory:
        floor = f"; below {size(found.floor_bytes)} nothing works" if found.floor_bytes > room.memory else ""
        problems.append(
            f"memory: {size(found.peak_bytes)} at the peak ({found.moment}), but {room.source} leaves "
            f"{size(room.memory)}{floor}"
        )
    return problems + _disk_problems(found, room)


def _disk_problems(found: Estimate, room: Room) -> list[str]:
    if room.cache is None:
        short = found.disk_bytes > room.disk
        return [f"disk: {size(found.disk_bytes)} to be written, but {size(room.disk)} are free"] if short else []
    cached = sum(found.disk.get(part, 0) for part in IN_CACHE)
    run, problems = found.disk_bytes - cached, []
    if run > room.disk:
        problems.append(f"disk: {size(run)} to be written to the run, but {size(room.disk)} are free there")
    if cached > room.cache:
        problems.append(
            f"disk: {size(cached)} to be written to the cache {machine.cache_dir()}, but {size(room.cache)} are free "
            "there; set VENEER_CACHE to a folder with more room"
        )
    return problems


def certainly_too_large(found: Estimate, room: Room) -> bool:
    """Whether it would not fit even if the estimate were `MARGIN` too high, or its disk is too small."""
    memory = room.memory is not None and found.peak_bytes * (1 - MARGIN) > room.memory
    return memory or bool(_disk_problems(found, room))
