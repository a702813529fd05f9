"""Every claim's script runs, in seconds, on a made model, and its second call trains nothing again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import costs, lora, loraplus, mathword, uuids

TINY = ["--first", "1", "--dtype", "float32", "--seeds", "2"]
TEXT = [*TINY, "--n-rates", "1", "--tokens-per-step", "60", "--epochs", "1", "--look", "1"]


def run(module: Any, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
    module.main()
    return capsys.readouterr().out


def test_uuids(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sizes = ["--pairs", "3", "--steps", "2", "--tokens-per-step", "100", "--rates", "1e-2"]
    argv = ["--out", str(tmp_path / "out.jsonl"), "--model", str(model), *sizes, *TINY]
    said = run(uuids, argv, monkeypatch, capsys)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["claim"] for r in results] == [f"uuids {regime}" for regime in uuids.REGIMES for _ in range(6)]
    by_side = {(r["claim"], r["side"]): r["parameters"] for r in results}
    assert by_side["uuids paper", "LoRA"] == pytest.approx(by_side["uuids paper", "MoRA sharing"], rel=0.05)
    assert all([row["step"] for row in r["curve"]] == [0, 1, 2] for r in results)
    assert said.count("| MoRA rotation |") == len(uuids.REGIMES)
    again = run(uuids, argv, monkeypatch, capsys)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == results
    assert again.count("| MoRA rotation |") == len(uuids.REGIMES)


def test_pairs_are_of_their_seed() -> None:
    assert uuids.pairs(3, 1) == uuids.pairs(3, 1) != uuids.pairs(3, 2)
    assert all(len(p["key"]) == 8 and len(p["value"]) == 36 for p in uuids.pairs(3, 1))


@pytest.mark.parametrize("module, more", [(lora, []), (loraplus, []), (mathword, ["--task", "mathword"])])
def test_text(
    module: Any, more: list[str], model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = ["--train", str(rows), "--held-out", str(rows), "--model", str(model), "--out", str(tmp_path / "out.jsonl")]
    said = run(module, [*data, *TEXT, *more], monkeypatch, capsys)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(results) == 2 * len(module.SIDES)
    assert all(f"| {side} |" in said for side in module.SIDES)
    assert json.loads(said.splitlines()[-1])["trainings"] == len(results)


def test_costs_of_training(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for side in costs.TRAINED:
        argv = ["train", "--model", str(model), "--tokens", "32", "--steps", "2", "--dtype", "float32", "--side", side]
        figures = json.loads(run(costs, argv, monkeypatch, capsys))
        assert figures["optimizer_bytes"] >= 8 * figures["parameters"] and figures["step_seconds"] > 0


def test_costs_of_answering(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    argv = ["answer", "--model", str(model), "--tokens", "2", "--rounds", "3", "--dtype", "float32"]
    answer = json.loads(run(costs, argv, monkeypatch, capsys))["answer"]
    assert answer.keys() == {"base", "merged LoRA", *costs.ADAPTERS}
    assert answer["base"]["vs_base"] == 1
