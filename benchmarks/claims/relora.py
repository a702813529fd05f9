"""Do restarts make low-rank training better in continual pretraining, and how do they fail?  ReLoRA and ReMoRA.

    python -m benchmarks.claims.relora --out relora.jsonl --first-corpus tinyshakespeare.train.jsonl.gz \\
        --corpus gsm8k.train.jsonl.gz --held-out gsm8k.val.jsonl.gz --text "{question} {answer}" [--minutes 30]

ReLoRA, arXiv:2307.05695, table 2 (perplexity on C4 after a warm start, 130M): full 23.65, ReLoRA 25.04, LoRA 25.46;
and table 6: restarts with an optimizer reset but without re-warming diverge. MoRA, arXiv:2405.12130, table 3 (250M):
MoRA 28.54, ReMoRA 26.74, LoRA 33.40, ReLoRA 32.19.

Here a made LLaMA (2 blocks, hidden 64, 512 words) learns a first corpus for 300 steps with all weights at a constant
rate (the papers' warm start), is merged, and goes on with a second one.  A restart can only pay where rank is the
limit, so the rank is 1, the second corpus far from the first, and a cycle has 200 steps: in cycles of 40 steps LoRA is
still learning when it is interrupted.  All sides have the same base, steps, rows and number of trained numbers (full
fine-tuning of the same layers apart).  Perplexity is of held-out text, a token.  `rank` is of the summed change, mean
over layers: singular values above a thousandth of the largest.  More runs at ReLoRA's best rate and at the next higher
one keep the optimizer's moments at a restart, do not let the learning rate rise again, or neither; `spike` is the
highest held-out perplexity within 16 steps after a restart, looked at every second step, over the one before it.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.sweep import Claim, Result, run, table
from benchmarks.claims.synthetic import made_model
from benchmarks.claims.trained_model import Subject, Trained
from benchmarks.report import closing_line, commit
from veneer.data.sources import read_rows
from veneer.machine import prepare_process
from veneer.train.setup import Training

RATES = (1e-2, 3e-2, 3e-3)
LOOKS = 20
"""Measurements of a training, evenly spread."""
AFTER = range(0, 17, 2)
"""Steps after a restart at which a training is measured too."""
RESTARTED = {"every": 0.25, "warmup": 0.1}
"""Cycle as a share of all steps, re-warm-up as a share of a cycle."""
LORA = {"name": "lora", "rank": 1, "alpha": 2}
MORA = {"name": "mora", "rank": 1, "variant": "sharing"}
SIDES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]] = {
    "LoRA": (LORA, None),
    "ReLoRA": (LORA, RESTARTED),
    "MoRA": (MORA, None),
    "ReMoRA": (MORA, RESTARTED),
    "full": ({"name": "full"}, None),
    "ReLoRA, moments kept": (LORA, {**RESTARTED, "reset": "none"}),
    "ReLoRA, no re-warm-up": (LORA, {**RESTARTED, "warmup": 0}),
    "ReLoRA, neither": (LORA, {**RESTARTED, "warmup": 0, "reset": "none"}),
}
"""Method and restarts by the name in the table."""
COMPARED = ("LoRA", "ReLoRA", "MoRA", "ReMoRA", "full")
BROKEN = ("ReLoRA", *(side for side in SIDES if side not in COMPARED))


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        subject = warmed_up(args, Path(scratch))
        compared = claim_of("relora", args.sides, args.rates, subject, args)
        results = run(compared, args.out, args.minutes)
        print(f"\n{table(compared, results, also=('rank',))}\n", flush=True)
        if "ReLoRA" not in args.sides or not results:
            return
        best = compared.best_rate(results, "ReLoRA")
        above = [rate for rate in sorted(args.rates) if rate >= best][:2]
        trainings = len(results)
        for rate in above:
            broken = claim_of(f"relora broken at {rate:g}", BROKEN, [rate], subject, args, results)
            failures = run(broken, args.out, args.minutes)
            trainings += len(failures)
            print(f"\n{broken.name}\n\n{table(broken, failures, also=('spike', 'rank'))}\n", flush=True)
    closing_line({"claim": "relora", "trainings": trainings})


def claim_of(
    name: str,
    sides: Sequence[str],
    rates: Sequence[float],
    subject: Subject,
    args: argparse.Namespace,
    finished: Sequence[Result] = (),
) -> Claim:
    """The sides at the rates; a training that is among the finished ones of another claim is not made again."""

    def train(side: str, lr: float, seed: int) -> Result:
        same = [r for r in finished if (r.side, r.lr, r.seed) == (side, lr, seed)]
        if same:
            return replace(same[0], claim=name)
        method, restarts = SIDES[side]
        changes: dict[str, Any] = {"method": method, "optimizer": {"lr": lr}, "train": {"seed": seed}}
        cycle = args.steps if restarts is None else round(restarts["every"] * args.steps)
        if restarts is not None:
            changes["restarts"] = {**restarts, "every": cycle}
        after = {start + k for start in range(cycle, args.steps, cycle) for k in AFTER}
        every = max(1, args.steps // LOOKS)
        done = subject.trained(changes, lambda training: measured(training, subject), every, after)
        figures = {**done.last, "spike": spike(done, cycle)}
        return Result(name, side, lr, seed, done.parameters, done.seconds, figures, done.curve, commit())

    return Claim(
        name, list(sides), dict.fromkeys(sides, rates), "perplexity", train, lower_is_better=True, seeds=args.seeds
    )


def measured(training: Training, subject: Subject) -> dict[str, float]:
    """Perplexity on the held-out rows and the rank of the change so far."""
    weights = {path: training.base.network.get_submodule(path).weight for path in training.adapter.deltas}
    ranks = [rank_of(d.fold(torch.zeros(weights[path].shape))) for path, d in training.adapter.deltas.items()]
    return {"perplexity": exp(subject.loss(training)), "rank": sum(ranks) / len(ranks)}


def rank_of(change: torch.Tensor) -> int:
    """Singular values above a thousandth of the largest; 0 for no change."""
    values = torch.linalg.svdvals(change.detach())
    return int((values > 1e-3 * values[0]).sum()) if values[0] > 0 else 0


def spike(done: Trained, cycle: int) -> float:
    """The highest perplexity soon after a restart over the one at it; 1 without restarts."""
    at = {int(row["step"]): row["perplexity"] for row in done.curve}
    restarts = [step for step in at if step and step % cycle == 0 and step + AFTER.step in at]
    return max((at[r + d] / at[r] for r in restarts for d in AFTER if r + d in at), default=1.0)


def warmed_up(args: argparse.Namespace, scratch: Path) -> Subject:
    """The made model after its warm start, with the rows it goes on with."""
    base = args.base or scratch / "base"
    if not base.exists():
        warm_up(args, scratch, base)
    return Subject(
        {
            "model": str(base),
            "data": {"train": args.corpus, "eval": args.held_out, "eval_rows": args.eval_rows, "text": args.text},
            "train": {**shape(args), "schedule": "cosine", "steps": args.steps, "warmup": 0.05},
        }
    )


def warm_up(args: argparse.Namespace, scratch: Path, base: Path) -> None:
    """Train all weights of a made model for a while, merged into `base`."""
    from veneer.merge.fold import merge
    from veneer.recipe.load import recipe_from
    from veneer.train.run import train_recipe

    words = [args.first_text.format(**row.columns) for row in read_rows(args.first_corpus)]
    made = made_model(scratch / "made", words, args.hidden, args.blocks)
    recipe = {
        "model": str(made),
        "data": {"train": args.first_corpus, "text": args.first_text},
        "method": {"name": "full", "targets": r".*(_proj|embed_tokens|lm_head)"},
        "optimizer": {"lr": 3e-3},
        "train": {
            **shape(args),
            "schedule": "constant",
            "steps": args.warm_steps,
            "warmup": 0.1,
            "checkpoint_every": 0,
        },
        "run": str(scratch / "warm"),
    }
    outcome, training = train_recipe(recipe_from(recipe))
    assert training is not None, "the run was new"
    print(f"warm start: loss {outcome.loss:.3f} after {outcome.steps} steps", flush=True)
    merge(training.adapter, made, base)


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """What the warm start and all trainings have in common."""
    return {"max_length": 64, "tokens_per_step": args.tokens_per_step, "dtype": "float32"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of finished trainings; gone on with")
    parser.add_argument("--first-corpus", required=True, help="JSONL of the warm start")
    parser.add_argument("--first-text", default="{text}", help="template of its rows' text")
    parser.add_argument("--corpus", required=True, help="JSONL to go on with")
    parser.add_argument("--held-out", required=True, help="JSONL of the same kind to measure on")
    parser.add_argument("--text", default="{text}", help="template of a row's text")
    parser.add_argument("--base", type=Path, help="folder of the warmed-up model: made there, or used if it is there")
    parser.add_argument("--sides", nargs="+", choices=COMPARED, default=COMPARED)
    parser.add_argument("--eval-rows", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens-per-step", type=int, default=512)
    parser.add_argument("--warm-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so many")
    return parser.parse_args()


if __name__ == "__main__":
    prepare_process()
    main()
