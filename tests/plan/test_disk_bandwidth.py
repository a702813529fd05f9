"""Rates are bytes over the seconds that the clock says."""

from pathlib import Path
from typing import Any

import pytest

from veneer.disk.readahead import CHUNK
from veneer.plan import disk_bandwidth
from veneer.plan.disk_bandwidth import read_rate, scratch_rates, write_rate
from veneer.train.activation_offload import ActivationFile


@pytest.fixture
def three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 300, 3))
    monkeypatch.setattr("veneer.plan.disk_bandwidth.time.perf_counter", lambda: next(ticks))


@pytest.mark.parametrize(("size", "read"), [(1000, 1000), (2 * CHUNK + 5, 2 * CHUNK), (5 * CHUNK, 3 * CHUNK)])
def test_reads_the_middle_of_a_file(size: int, read: int, three_seconds: None, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.truncate(size)
    assert read_rate(file, 3 * CHUNK) == read / 3


def test_writes_and_gives_the_room_back(three_seconds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_bandwidth, "WRITTEN", 3 << 20)
    assert write_rate(tmp_path) == 1 << 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("nbytes", "count"), [(1 << 20, 3), (1000, 4), (5 << 20, 2)])
def test_tensors_go_to_a_scratch_file_and_come_back(
    nbytes: int, count: int, three_seconds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_bandwidth, "WRITTEN", 3 << 20)
    monkeypatch.setattr(disk_bandwidth, "AT_MOST", 4)
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
