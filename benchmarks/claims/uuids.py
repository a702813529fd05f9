"""Does MoRA memorize more than LoRA with equally many trained numbers?  UUID pairs on SmolLM2-135M.

    python -m benchmarks.claims.uuids --out uuids.jsonl [--regime crowded|paper|roomy|plenty] [--minutes 30]

MoRA, arXiv:2405.12130, section 4.1 and table 2: 10,000 pairs of UUIDs, LLaMA-2 7B, all linear layers; after 500, 700
and 900 steps rank 8 has 10, 11 and 54 % of the characters right with LoRA, 16, 87 and 100 % with MoRA.

Here 32 pairs (or 8), a key of 8 hexadecimal digits and a whole UUID to remember, 122 random bits each, in the
last blocks of SmolLM2-135M; all else is frozen, and computed once. Only the values are trained and measured, as the
share of their tokens that are the model's first choice after the key and the right tokens before. Every side has the
same pairs, steps and learning rates to choose from, and as many trained numbers as MoRA's rounding allows.

Regimes, by random bits to remember for each trained number (the paper's runs of rank 8 have 0.12, counting values):
crowded 0.5 (rank 1 on queries and values), paper 0.1 (rank 1 on all linear layers), roomy 0.012 (rank 8 on them),
plenty 0.003 (rank 8 on them, and only 8 pairs).
"""

import argparse
import random
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.claims.rows import written
from benchmarks.claims.sweep import Claim, Result, run, table
from benchmarks.claims.token_accuracy import most_likely
from benchmarks.claims.trained_model import Subject
from benchmarks.report import closing_line, commit
from veneer.machine import prepare_process

RATES = (2e-2, 6e-3, 6e-2, 2e-3, 2e-1)
REGIMES: dict[str, tuple[int, Any, int]] = {
    "crowded": (1, ("q_proj", "v_proj"), 32),
    "paper": (1, "all-linear", 32),
    "roomy": (8, "all-linear", 32),
    "plenty": (8, "all-linear", 8),
}
"""Rank, targets and pairs by regime."""


def sides(rank: int, targets: Any) -> dict[str, Mapping[str, Any]]:
    """The recipe's section `method` by the name in the table."""
    methods: dict[str, dict[str, Any]] = {
        "LoRA": {"name": "lora", "alpha": rank},
        "MoRA sharing": {"name": "mora", "variant": "sharing"},
        "MoRA rotation": {"name": "mora", "variant": "rotation"},
    }
    return {side: {**method, "rank": rank, "targets": targets} for side, method in methods.items()}


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Random keys and values."""
    draw = random.Random(seed)
    made = [str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(2 * count)]
    return [{"key": key[:8], "value": value} for key, value in zip(made[:count], made[count:], strict=True)]


def main() -> None:
    args = arguments()
    for regime in args.regime:
        claim = claim_of(args, regime)
        results = run(claim, args.out, args.minutes)
        print(f"\n{claim.name}\n\n{table(claim, results)}\n", flush=True)
        closing_line({"claim": claim.name, "trainings": len(results)})


def claim_of(args: argparse.Namespace, regime: str) -> Claim:
    rank, targets, count = REGIMES[regime]
    methods, subjects = sides(rank, targets), {}

    def train(side: str, lr: float, seed: int) -> Result:
        if seed not in subjects:
            subjects.clear()
            subjects[seed] = subject(args, args.pairs or count, seed)
        changes = {"method": methods[side], "optimizer": {"lr": lr}, "train": {"seed": seed}}
        done = subjects[seed].trained(changes, most_likely, every=max(1, args.steps // 8))
        figures = {**done.last, "loss": done.losses[-1]}
        return Result(name, side, lr, seed, done.parameters, done.seconds, figures, done.curve, commit())

    name = f"uuids {regime}"
    return Claim(name, list(methods), dict.fromkeys(methods, args.rates), "tokens_right", train, seeds=args.seeds)


def subject(args: argparse.Namespace, count: int, seed: int) -> Subject:
    with tempfile.TemporaryDirectory() as scratch:
        tree = {
            "model": args.model,
            "data": {
                "train": written(pairs(count, seed), Path(scratch) / "pairs.jsonl"),
                "prompt": "{key}",
                "separator": ":",
                "completion": "{value}",
                "format": "plain",
            },
            "train": {"steps": args.steps, "tokens_per_step": args.tokens_per_step, "warmup": 0.1, "dtype": args.dtype},
        }
        return Subject(tree, args.first)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of finished trainings; gone on with")
    parser.add_argument("--regime", nargs="+", choices=sorted(REGIMES), default=list(REGIMES))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--first", type=int, default=26, help="the lowest block that is trained")
    parser.add_argument("--pairs", type=int, help="other than the regime's")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--tokens-per-step", type=int, default=350, help="of about 43 a pair")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so many")
    return parser.parse_args()


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
