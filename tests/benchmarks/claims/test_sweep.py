"""Sweeps: what is trained in which order, going on, the best rate, and the table."""

from pathlib import Path

from benchmarks.claims.sweep import Claim, Result, read, run, table

LOSSES = {("a", 0.1): 3.0, ("a", 0.2): 2.0, ("b", 0.01): 1.0, ("b", 0.02): 1.0}


def claim_of(trained: list[tuple[str, float, int]], **changes: object) -> Claim:
    def train(side: str, lr: float, seed: int) -> Result:
        trained.append((side, lr, seed))
        return Result("c", side, lr, seed, 7, 1.0, {"loss": LOSSES[side, lr] + seed}, [{"step": 0, "loss": 9.0}])

    settings = {"lower_is_better": True} | changes
    return Claim("c", ["a", "b"], {"a": [0.1, 0.2], "b": [0.02, 0.01]}, "loss", train, **settings)  # type: ignore[arg-type]


ALL = [("a", 0.1, 0), ("b", 0.02, 0), ("a", 0.2, 0), ("b", 0.01, 0), ("a", 0.2, 1), ("b", 0.01, 1), ("a", 0.2, 2)]


def test_sides_take_turns_and_other_seeds_only_run_at_the_best_rate(tmp_path: Path) -> None:
    trained: list[tuple[str, float, int]] = []
    results = run(claim_of(trained), tmp_path / "out.jsonl")
    assert trained == [*ALL, ("b", 0.01, 2)]
    assert read(tmp_path / "out.jsonl") == results


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, first, second = tmp_path / "out.jsonl", list[tuple[str, float, int]](), list[tuple[str, float, int]]()
    assert run(claim_of(first), out, minutes=0) == [] and not out.exists()
    run(claim_of(first, seeds=1), out)
    run(claim_of(second), out)
    assert first == ALL[:4] and second == [*ALL[4:], ("b", 0.01, 2)]


def test_results_of_other_claims_do_not_count(tmp_path: Path) -> None:
    trained: list[tuple[str, float, int]] = []
    claim = claim_of(trained, seeds=1)
    run(claim, tmp_path / "out.jsonl")
    other = Claim("d", claim.sides, claim.rates, "loss", claim.train, seeds=1)
    assert len(run(other, tmp_path / "out.jsonl")) == 4


def test_more_can_be_better() -> None:
    results = [Result("c", "a", lr, 0, 7, 1.0, {"loss": value}) for lr, value in ((0.1, 3.0), (0.2, 2.0))]
    assert claim_of([]).best_rate(results, "a") == 0.2
    assert claim_of([], lower_is_better=False).best_rate(results, "a") == 0.1


def test_the_table_has_spread_and_every_rate(tmp_path: Path) -> None:
    claim = claim_of([])
    lines = table(claim, run(claim, tmp_path / "out.jsonl")).splitlines()
    assert lines[2] == "| a | 7 | 0.2 | 3 (2 to 4, 3 seeds) | 0.1: 3.000, 0.2: 2.000 |"
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert len(table(claim, []).splitlines()) == 2
