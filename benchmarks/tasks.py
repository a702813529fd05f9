"""How good does a small model get on a real task, how fast, and in how much memory? Beside a plain PEFT run if asked.

    python benchmarks/tasks.py --task wikisql --train wikisql.train.jsonl.gz --eval wikisql.val.jsonl.gz \\
        --train-rows 1600 --eval-rows 200 --peer

QLoRA: is a 4-bit base as good as a 16-bit one? Every storage with every seed, and a table of mean and spread:

    python benchmarks/tasks.py --task wikisql --train wikisql.train.jsonl.gz --eval wikisql.val.jsonl.gz \\
        --train-rows 1600 --eval-rows 200 --storage dense nf4+dq fp4+dq --seed 0 1 2 --record qlora.jsonl

Tasks: wikisql (rows with question, schema, sql, rows; execution accuracy), mathword (question, equation, answer; the
equation's value), e2e_nlg (mr, text; refs for evaluation; ROUGE-L and BLEU). Each side trains in a process of its own,
one after the other, on the same tokens in the same session; `seconds` and `peak_bytes` are of training, loading
excluded from the first and included in the second. The peer is transformers + peft as their documentation shows it; its
adapter is then loaded here and measured like ours. With --record every finished run is added to that file, and a run
that stands in it is not made again: a command that was stopped goes on, several may share the work, and the whole
command afterwards prints the table.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from report import closing_line
from runs import STORAGES, TASKS, Run, opened, scores, trained

from veneer.machine import prepare_process


def main() -> None:
    args = arguments()
    record = Record(args.record)
    sides = ["veneer", *(["peft"] if args.peer else [])]
    headline = TASKS[args.task].headline
    finished: dict[tuple[str, str], list[dict[str, Any]]] = {}
    before: dict[str, float] = {}
    for seed in args.seed:
        for storage in args.storage:
            run = run_of(args, storage, seed)
            base = record.figures("base", replace(run, seed=0), measure_base)
            before[storage] = base[headline]
            for side in sides:
                figures = record.figures(side, run, lambda run, side=side: train_and_measure(run, side))
                finished.setdefault((storage, side), []).append(figures)
    print_table(before, finished, headline)
    closing_line(closing(args, before, finished, headline))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--storage", nargs="+", choices=list(STORAGES), default=["dense"], help="of the frozen weights")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="keep finished runs here, and go on from it")
    parser.add_argument("--peer", action="store_true", help="train the same rows with plain peft too")
    args = parser.parse_args()
    if args.peer and args.storage != ["dense"]:
        parser.error("--peer trains on 16-bit weights: leave --storage out")
    return args


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides a run but its storage; `run_of` reads it."""
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--train", required=True, help="JSONL of training rows")
    parser.add_argument("--eval", required=True, help="JSONL of rows to measure on")
    parser.add_argument("--train-rows", type=int, help="only the first so many")
    parser.add_argument("--eval-rows", type=int, help="only the first so many")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, help="default: twice the rank")
    parser.add_argument("--lr", type=float, help="default: the task's")
    parser.add_argument("--lr-ratio", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--tokens-per-step", type=int, default=768)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])


def run_of(args: argparse.Namespace, storage: str, seed: int) -> Run:
    given = {name: getattr(args, name) for name in Run.__dataclass_fields__ if name not in ("storage", "seed")}
    given["alpha"] = args.alpha or 2.0 * args.rank
    given["lr"] = args.lr or TASKS[args.task].lr
    return Run(**given, storage=storage, seed=seed)


def measure_base(run: Run) -> dict[str, Any]:
    return scores(run, opened(run))


def train_and_measure(run: Run, side: str) -> dict[str, Any]:
    with trained(run, side) as (adapter, figures):
        return figures | scores(run, opened(run, adapter))


class Record:
    """Figures of finished runs, one JSON line each; without a file they are made every time."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def figures(self, kind: str, run: Run, make: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
        """What is recorded of this run, or else what `make` finds."""
        key = {"kind": kind, "run": asdict(run)}
        if self.path is not None and self.path.exists():
            for line in map(json.loads, self.path.read_text(encoding="utf-8").splitlines()):
                if {"kind": line["kind"], "run": line["run"]} == key:
                    figures: dict[str, Any] = line["figures"]
                    return figures
        figures = make(run)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(key | {"figures": figures}) + "\n")
        print(
            json.dumps({"kind": kind, "storage": run.storage, "seed": run.seed, **figures}), file=sys.stderr, flush=True
        )
        return figures


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def print_table(before: dict[str, float], finished: dict[tuple[str, str], list[dict[str, Any]]], headline: str) -> None:
    """One line for each storage and side: mean and sample standard deviation over the seeds."""
    columns = f"{'storage':8} {'side':7} {'n':>2} {'before':>7}"
    print(f"{columns} {headline:>16} {'loss':>16} {'tokens/s':>9} {'peak GB':>8}")
    for (storage, side), runs in finished.items():
        metric, loss = [r[headline] for r in runs], [r["loss"] for r in runs]
        print(
            f"{storage:8} {side:7} {len(runs):2} {before[storage]:7.3f} {mean(metric):7.3f} +- {spread(metric):5.3f} "
            f"{mean(loss):6.4f} +- {spread(loss):5.4f} {mean(r['tokens_per_second'] for r in runs):9.0f} "
            f"{max(r['peak_bytes'] for r in runs) / 1e9:8.2f}"
        )


def closing(
    args: argparse.Namespace,
    before: dict[str, float],
    finished: dict[tuple[str, str], list[dict[str, Any]]],
    headline: str,
) -> dict[str, Any]:
    """The figures of the first storage and seed under plain names, and those of all in `storages`."""
    first = finished[args.storage[0], "veneer"][0]
    run = run_of(args, args.storage[0], args.seed[0])
    figures: dict[str, Any] = {"task": run.task, "rank": run.rank, "lr": run.lr, "epochs": run.epochs}
    for (storage, side), runs in finished.items():
        if storage == args.storage[0]:
            prefix = "" if side == "veneer" else "peft_"
            figures |= {f"{prefix}{name}": value for name, value in runs[0].items() if name != headline}
            figures |= {f"{prefix}{headline}_after": runs[0][headline]}
    figures[f"{headline}_before"] = before[args.storage[0]]
    figures["storages"] = {
        storage: {
            "before": before[storage],
            "mean": mean(r[headline] for r in runs),
            "deviation": spread([r[headline] for r in runs]),
            "each": [r[headline] for r in runs],
        }
        for (storage, side), runs in finished.items()
        if side == "veneer"
    }
    if args.peer:
        peer = finished[args.storage[0], "peft"][0]
        figures["time_vs_peft"] = first["seconds"] / peer["seconds"]
        figures["memory_vs_peft"] = first["peak_bytes"] / peer["peak_bytes"]
    return figures


if __name__ == "__main__":
    prepare_process()
    main()
