"""Rates are bytes over seconds, needs are bytes over rates, and a slow disk is named with what would help."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.disk.readahead import CHUNK
from veneer.plan import disk as module
from veneer.plan.disk import Disk, Needs, paging, read_rate, scratch_rates, slow_disk, write_rate
from veneer.plan.memory import Estimate
from veneer.recipe.settings import Recipe
from veneer.train.activation_offload import ActivationFile
from veneer.train.optim.paged_state import SHORT

Make = Callable[..., Recipe]
MIB = 2**20
ALL = {"storage.name": "nf4", "train.recompute": True, "memory": {"page_weights": True, "page_activations": True}}


@pytest.fixture
def three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 300, 3))
    monkeypatch.setattr("veneer.plan.disk.time.perf_counter", lambda: next(ticks))


@pytest.mark.parametrize(("size", "read"), [(1000, 1000), (2 * CHUNK + 5, 2 * CHUNK), (5 * CHUNK, 3 * CHUNK)])
def test_reads_the_middle_of_a_file(size: int, read: int, three_seconds: None, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.truncate(size)
    assert read_rate(file, 3 * CHUNK) == read / 3


def test_writes_and_gives_the_room_back(three_seconds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITTEN", 3 << 20)
    assert write_rate(tmp_path) == 1 << 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("nbytes", "count"), [(1 << 20, 3), (1000, 4), (5 << 20, 2)])
def test_tensors_go_to_a_scratch_file_and_come_back(
    nbytes: int, count: int, three_seconds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITTEN", 3 << 20)
    monkeypatch.setattr(module, "AT_MOST", 4)
    moved: list[str] = []
    real = {name: getattr(ActivationFile, name) for name in ("_write", "_read")}
    for name in real:

        def seen(file: ActivationFile, place: int, *more: Any, name: str = name) -> Any:
            moved.append(name)
            return real[name](file, place, *more)

        monkeypatch.setattr(ActivationFile, name, seen)
    assert scratch_rates(tmp_path, nbytes) == (count * nbytes / 3, count * nbytes / 3)
    assert moved == ["_write"] * count + ["_read"] * count
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Writes 2 MiB a second and reads 8; what was asked for is collected."""
    asked: list[int] = []

    def rates(folder: Path, nbytes: int) -> tuple[float, float]:
        asked.append(nbytes)
        return 2.0 * MIB, 8.0 * MIB

    monkeypatch.setattr(module, "scratch_rates", rates)
    return asked


def with_state(peak: int, state: int) -> Estimate:
    disk = {"paged optimizer state": state} if state else {}
    return Estimate({"base": peak}, "head", peak, disk, 1, state)


def test_what_is_not_paged_measures_and_waits_for_nothing(recipe: Make, scratch: list[int], tmp_path: Path) -> None:
    found = paging(recipe(), with_state(MIB, 0), tmp_path, weights=(0, 1.0), inputs=MIB, room=MIB)
    assert found == (Disk(None, None), Needs()) and scratch == []


def test_needs_are_bytes_over_rates(recipe: Make, scratch: list[int], tmp_path: Path) -> None:
    disk, needs = paging(
        recipe(**ALL), with_state(MIB, 0), tmp_path, weights=(6 * MIB, 4.0 * MIB), inputs=MIB, room=None
    )
    assert needs == Needs(weights=1.5, written=0.5, read=0.125)
    assert (needs.forward, needs.backward) == (2.0, 1.625)  # one disk serves both
    assert disk == Disk(4.0 * MIB, 2.0 * MIB) and scratch == [MIB]


@pytest.mark.parametrize(
    ("room", "out"),
    [
        (None, 0),  # unknown
        (500 * MIB + SHORT, 0),
        (480 * MIB + SHORT, 20),
        (100 * MIB, 100),  # no more than there is
    ],
)
def test_state_that_has_no_room_is_written_and_read_in_every_step(
    room: int | None, out: int, recipe: Make, scratch: list[int], tmp_path: Path
) -> None:
    found = with_state(400 * MIB, 100 * MIB)
    disk, needs = paging(recipe(), found, tmp_path, weights=(0, 1.0), inputs=MIB, room=room)
    assert needs == Needs(state=out / 2 + out / 8)
    assert disk == (Disk(8.0 * MIB, 2.0 * MIB) if out else Disk())


def test_a_disk_that_takes_most_of_a_step_is_slow(recipe: Make) -> None:
    disk, parts = Disk(4.0 * MIB, 2.0 * MIB), {"weights": 4.0, "activations": 1.0}
    assert slow_disk(recipe(), disk, parts, 10.0) == []
    (said,) = slow_disk(recipe(), disk, parts, 9.9)
    assert "it reads 4 MiB and writes 2 MiB a second, so 5.0 s of a step's 9.9 s are spent on waiting" in said
    assert "(4.0 s for weights, 1.0 s for activations)" in said and "train.micro_batch_tokens" in said


@pytest.mark.parametrize(
    ("changes", "what", "helps"),
    [
        ({}, "activations", "memory.page_activations false"),
        ({}, "optimizer state", "optimizer.bits 8"),
        ({"optimizer.bits": 8}, "optimizer state", "a lower method.rank"),
    ],
)
def test_what_would_help_is_about_what_waits_longest(
    changes: dict[str, Any], what: str, helps: str, recipe: Make
) -> None:
    (said,) = slow_disk(recipe(**changes), Disk(None, 1.0 * MIB), {"weights": 0.1, what: 8.0}, 10.0)
    assert said.endswith(f"a faster disk, {helps}") and "it writes 1 MiB a second" in said
