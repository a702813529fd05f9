"""Does LoRA+ reach a given loss in fewer steps than LoRA?

    python -m benchmarks.claims.loraplus --out mathword.jsonl \\
        --train mathword.train.jsonl.gz --held-out mathword.val.jsonl.gz [--minutes 30]

LoRA+, arXiv:2402.12354: B learns at a multiple of A's learning rate; 1 to 2 % better, up to twice as fast, more so for
wide models and hard tasks; the best multiple for LoRA's usual start is 4 to 8 on RoBERTa, 2 to 4 on LLaMA.

Here word problems as in mathword.py. As many rates each, those of a ratio lower: their geometric mean with B's is
near LoRA's. `steps` are those until the held-out loss first is as low as LoRA's at the end of its best training with
the same seed.
"""

from collections.abc import Sequence

from benchmarks.claims.sweep import Claim, Result, run, spread, table
from benchmarks.claims.text_runs import claim_of, parser_of
from benchmarks.report import closing_line
from veneer.machine import prepare_process

SIDES = ("LoRA r 8", "LoRA+ ratio 4", "LoRA+ ratio 16")


def main() -> None:
    args = parser_of(__doc__).parse_args()
    claim = claim_of(args, "mathword", SIDES)
    results = run(claim, args.out, args.minutes)
    print(f"\n{table(claim, results, also=('whole_right',))}\n", flush=True)
    for side in SIDES:
        found = [step for step in steps_of(claim, results, side) if step is not None]
        print(f"{side}: steps {spread(found) if found else 'never'}", flush=True)
    closing_line({"claim": "loraplus", "trainings": len(results)})


def steps_of(claim: Claim, results: Sequence[Result], side: str) -> list[float | None]:
    """For each seed the first measured step at the side's best rate as good as LoRA's last; None if none is."""
    target = {r.seed: r.figures["loss"] for r in at_best(claim, results, "LoRA r 8")}
    mine = [r for r in at_best(claim, results, side) if r.seed in target]
    return [next((row["step"] for row in r.curve if row["loss"] <= target[r.seed]), None) for r in mine]


def at_best(claim: Claim, results: Sequence[Result], side: str) -> list[Result]:
    """A side's results at its best rate."""
    mine = [r for r in results if r.side == side]
    return [r for r in mine if r.lr == claim.best_rate(results, side)] if any(r.seed == 0 for r in mine) else []


if __name__ == "__main__":
    prepare_process()
    main()
