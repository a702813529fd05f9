"""A measurement is made once for the same facts, versions and threads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from veneer.plan import timing_cache as module
from veneer.plan.timing_cache import kept


@pytest.fixture
def measure() -> Callable[[], dict[str, float]]:
    made = iter(range(100))
    return lambda: {"step": float(next(made))}


def test_measured_once_for_the_same_facts(measure: Callable[[], dict[str, float]], tmp_path: Path) -> None:
    assert [kept({"rank": r}, measure)["step"] for r in (8, 8, 16, 8)] == [0.0, 0.0, 1.0, 0.0]
    files = list((tmp_path / "cache" / "timings").iterdir())
    assert len(files) == 2
    assert json.loads(files[0].read_text())["here"]["threads"] == torch.get_num_threads()


def test_other_threads_or_versions_are_measured_again(
    measure: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept({}, measure)["step"] == 0.0
    monkeypatch.setattr(module, "version", lambda name: "next")
    assert kept({}, measure)["step"] == 1.0
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    assert kept({}, measure)["step"] == 2.0


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": {"step": "long"}}', '{"other": 1}'])
def test_a_damaged_file_is_measured_again(text: str, measure: Callable[[], dict[str, float]], tmp_path: Path) -> None:
    kept({}, measure)
    (file,) = (tmp_path / "cache" / "timings").iterdir()
    file.write_text(text)
    assert kept({}, measure)["step"] == 1.0


def test_a_cache_that_cannot_be_written_only_costs_time(
    measure: Callable[[], dict[str, float]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    assert [kept({}, measure)["step"] for _ in range(2)] == [0.0, 1.0]
