"""Rates are bytes over the seconds that the clock says."""

from pathlib import Path

import pytest

from veneer.disk.readahead import CHUNK
from veneer.plan import rates
from veneer.plan.rates import read_rate, write_rate


@pytest.fixture
def three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 300, 3))
    monkeypatch.setattr("veneer.plan.rates.time.perf_counter", lambda: next(ticks))


@pytest.mark.parametrize(("size", "read"), [(1000, 1000), (2 * CHUNK + 5, 2 * CHUNK), (5 * CHUNK, 3 * CHUNK)])
def test_reads_the_middle_of_a_file(
    size: int, read: int, three_seconds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "SAMPLE", 3 * CHUNK)
    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.truncate(size)
    assert read_rate(file) == read / 3


def test_writes_and_gives_the_room_back(three_seconds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "WRITTEN", 3 << 20)
    assert write_rate(tmp_path) == 1 << 20
    assert list(tmp_path.iterdir()) == []
