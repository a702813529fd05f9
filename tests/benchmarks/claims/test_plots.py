"""Figures of finished trainings."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.claims import plots
from benchmarks.claims.sweep import Result


def result(side: str, lr: float, seed: int, last: float) -> Result:
    return Result("c", side, lr, seed, 1, 1.0, {}, [{"step": 0, "loss": 9.0}, {"step": 5, "loss": last}])


RESULTS = [result("a", 0.1, 0, 3.0), result("a", 0.2, 0, 2.0), result("a", 0.2, 1, 4.0), result("b", 0.1, 0, 5.0)]


def test_a_side_is_drawn_at_its_best_rate() -> None:
    assert plots.at_best(RESULTS[:3], "loss", True) == RESULTS[1:3]
    assert plots.at_best(RESULTS[:3], "loss", False) == RESULTS[:1]


def test_a_figure_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the figures need matplotlib (veneer[plots])")
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in RESULTS))
    into = tmp_path / "out.svg"
    argv = ["plots", str(tmp_path / "out.jsonl"), "--figure", "loss", "--lower-is-better", "--into", str(into)]
    monkeypatch.setattr(sys, "argv", argv)
    plots.main()
    first = into.read_text()
    plots.main()
    assert first.startswith("<?xml") and into.read_text() == first
