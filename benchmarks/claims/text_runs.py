"""Trainings on text in the upper blocks of SmolLM2: what lora.py, loraplus.py and mathword.py share.

Held-out rows are measured by their loss, a supervised token in nats, and by the share of completions that greedy
generation would write exactly (`likely.py`).  Only the words that occur in the rows compete (`shortcut.py`).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.sweep import Claim, Result
from benchmarks.claims.token_accuracy import most_likely
from benchmarks.claims.trained_model import Subject
from benchmarks.report import commit
from veneer.train.setup import Training

TASKS = {
    "mathword": {"prompt": "{question}", "completion": "{equation}", "format": "plain"},
    "instructions": {"prompt": "{instruction}\n{input}", "completion": "{output}", "format": "plain"},
}
"""A recipe's section `data` by task."""
SIDES: dict[str, tuple[Mapping[str, Any], float, Sequence[float]]] = {
    "LoRA r 8": ({"name": "lora", "rank": 8, "alpha": 16}, 1, (3e-3, 1e-2, 1e-3, 3e-2, 1e-1)),
    "LoRA r 1": ({"name": "lora", "rank": 1, "alpha": 2}, 1, (3e-3, 1e-2, 1e-3, 3e-2, 1e-1)),
    "MoRA r 8": ({"name": "mora", "rank": 8, "variant": "rotation"}, 1, (3e-3, 1e-2, 1e-3, 3e-2, 1e-1)),
    "full": ({"name": "full"}, 1, (3e-4, 1e-3, 1e-4, 3e-3, 1e-2)),
    "LoRA+ ratio 4": ({"name": "lora", "rank": 8, "alpha": 16}, 4, (1.5e-3, 5e-3, 5e-4, 1.5e-2, 5e-2)),
    "LoRA+ ratio 16": ({"name": "lora", "rank": 8, "alpha": 16}, 16, (7.5e-4, 2.5e-3, 2.5e-4, 7.5e-3, 2.5e-2)),
}
"""Method, ratio of learning rates, and the rates that are tried, by the name in the table."""


class Subjects:
    """The subject of a run, made when a training first needs it: an already finished sweep loads no model."""

    def __init__(self, args: argparse.Namespace, task: str) -> None:
        self._args, self._task, self._subject = args, task, None

    def get(self) -> Subject:
        if self._subject is None:
            self._subject = subject(self._args, self._task)
        return self._subject


def claim_of(args: argparse.Namespace, task: str, sides: Sequence[str]) -> Claim:
    """The named sides on a task; a side's trainings are the same whichever claim asks for them."""
    subjects = Subjects(args, task)

    def train(side: str, lr: float, seed: int) -> Result:
        method, ratio, _ = SIDES[side]
        changes = {"method": method, "optimizer": {"lr": lr, "lr_ratio": ratio}, "train": {"seed": seed}}
        done = subjects.get().trained(changes, lambda training: measured(training, subjects.get()), every=args.look)
        costs = {"optimizer_bytes": float(done.optimizer_bytes), "step_seconds": done.seconds / len(done.losses)}
        figures = {**done.last, **costs}
        return Result(task, side, lr, seed, done.parameters, done.seconds, figures, done.curve, commit())

    rates = {side: SIDES[side][2][: args.n_rates] for side in sides}
    return Claim(task, sides, rates, "loss", train, lower_is_better=True, seeds=args.seeds)


def measured(training: Training, subject: Subject) -> dict[str, float]:
    """Loss and shares of first choices over the held-out rows."""
    return {"loss": subject.loss(training), **most_likely(training, "held_out")}


def subject(args: argparse.Namespace, task: str) -> Subject:
    data = {"train": args.train, "rows": args.rows, "eval": args.held_out, "eval_rows": args.eval_rows}
    shape = {"epochs": args.epochs, "tokens_per_step": args.tokens_per_step, "max_length": 256, "dtype": args.dtype}
    return Subject({"model": args.model, "data": {**data, **TASKS[task]}, "train": shape}, args.first)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What the scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of finished trainings; gone on with")
    parser.add_argument("--train", required=True, help="JSONL of training rows")
    parser.add_argument("--held-out", required=True, help="JSONL of rows to measure on")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--first", type=int, default=26, help="the lowest block that is trained")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--tokens-per-step", type=int, default=800)
    parser.add_argument("--look", type=int, default=6, help="steps between measurements")
    parser.add_argument("--n-rates", type=int, default=4, help="learning rates of each side that are tried, at most 5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after so many")
    return parser
