"""Restarts among the claims: what is measured, and the script in a tiny mode."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.claims import relora
from benchmarks.claims.trained_model import Trained

TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind to suffer. "


def test_rank_counts_what_is_not_small() -> None:
    assert relora.rank_of(torch.zeros(4, 5)) == 0
    assert relora.rank_of(torch.diag(torch.tensor([5.0, 1.0, 1e-2, 1e-4]))) == 3


def test_a_spike_is_over_the_perplexity_at_the_restart() -> None:
    curve = [{"step": s, "perplexity": p} for s, p in ((0, 99), (6, 12), (8, 8), (10, 20), (16, 9), (18, 7))]
    assert relora.spike(Trained(1, curve=curve), 8) == 2.5
    assert relora.spike(Trained(1, curve=curve), 20) == 1.0


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{i}: {TEXT * 4}"}) + "\n" for i in range(20)))
    sizes = ["--hidden", "32", "--warm-steps", "2", "--steps", "16", "--tokens-per-step", "200", "--rates", "1e-2"]
    files = ["--first-corpus", corpus, "--corpus", corpus, "--held-out", corpus]
    files += ["--base", tmp_path / "base", "--out", tmp_path / "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["relora", *map(str, files), *sizes, "--seeds", "1"])
    relora.main()
    said = capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by_claim = {name: [r for r in results if r["claim"] == name] for name in ("relora", "relora broken at 0.01")}
    assert [[r["side"] for r in rs] for rs in by_claim.values()] == [list(relora.COMPARED), list(relora.BROKEN)]
    assert all(f"| {side} |" in said for side in relora.SIDES) and (tmp_path / "base" / "config.json").exists()
    again = [{k: v for k, v in r.items() if k != "claim"} for r in results if r["side"] == "ReLoRA"]
    assert again[0] == again[1], "trained once"
    ranks = {r["side"]: {row["step"]: row["rank"] for row in r["curve"]} for r in by_claim["relora"]}
    assert [ranks["LoRA"][step] for step in (4, 8, 16)] == [1, 1, 1]
    assert [ranks["ReLoRA"][step] for step in (4, 8, 16)] == [1, 2, 4], "a restart every 4 steps, measured before it"
    assert {r["parameters"] for r in results if r["side"].startswith(("LoRA", "ReLoRA"))} == {1280}
