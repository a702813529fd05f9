"""Restarts among the claims: what is measured, and the script in a tiny mode."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.claims import relora
from benchmarks.claims.subject import Training

TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind to suffer. "


def test_rank_counts_what_is_not_small() -> None:
    assert relora.rank_of(torch.zeros(4, 5)) == 0
    assert relora.rank_of(torch.diag(torch.tensor([5.0, 1.0, 1e-2, 1e-4]))) == 3


def test_a_spike_is_over_the_perplexity_at_the_restart() -> None:
    curve = [{"step": s, "perplexity": p} for s, p in ((0, 99), (4, 10), (8, 8), (12, 20), (16, 9), (20, 7))]
    assert relora.spike(Training(1, curve=curve), 8) == 2.5
    assert relora.spike(Training(1, curve=curve), 20) == 1.0


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{i}: {TEXT * 4}"}) + "\n" for i in range(20)))
    sizes = ["--hidden", "32", "--warm-steps", "2", "--steps", "16", "--tokens-per-step", "200", "--rates", "1e-2"]
    files = ["--first-corpus", corpus, "--corpus", corpus, "--held-out", corpus, "--out", tmp_path / "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["relora", *map(str, files), *sizes, "--seeds", "1"])
    relora.main()
    said = capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {r["side"] for r in results} == set(relora.SIDES) and all(f"| {side} |" in said for side in relora.SIDES)
    ranks = {r["side"]: [row["rank"] for row in r["curve"]] for r in results}
    assert ranks["LoRA"][1:] == [2, 2, 2, 2]
    assert ranks["ReLoRA"][1:3] == [2, 4], "a restart every 4 steps, measured before it"
    assert {r["parameters"] for r in results if r["side"].startswith(("LoRA", "ReLoRA"))} == {5120}
