"""What do fewer bits cost?  Error of the weights, perplexity and a task's metric, before and after a LoRA, by storage.

    python benchmarks/quantization.py --task wikisql --train wikisql.train.jsonl.gz --eval wikisql.val.jsonl.gz \\
        --text held_out.jsonl [--seed 0 1 2] [--record quantization.jsonl]

For 16-bit weights, NF4 and FP4 with and without double quantization (+dq), and int8: bits a weight; the relative error
of all weights, |W' - W| / |W| in Frobenius norms, that of the worst layer, and the largest difference of one weight;
perplexity of the held-out text and the task's metric of the base alone; and both again with a LoRA that was trained on
that base, as tasks.py trains it, in mean and sample standard deviation over the seeds. `--text` names rows with a
column `text` (or others: see --text-template); without it perplexity is that of the right answers of the `--eval` rows.
The defaults take about a quarter of an hour on two cores for one seed; `--record` goes on from what is finished.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from report import closing_line
from runs import STORAGES, TASKS, Run, opened, recipe_of, scores, trained
from tasks import Record, add_run_arguments, run_of, spread

from veneer.machine import prepare_process


def main() -> None:
    args = arguments()
    record, headline = Record(args.record), TASKS[args.task].headline
    text = f"{args.text} {args.text_template} {args.text_rows}"
    table: dict[str, dict[str, Any]] = {}
    print_heading(headline)
    for storage in args.storage:
        run = run_of(args, storage, 0)
        before = record.figures(f"error, before, text {text}", run, lambda run: error_of(run) | both(run, args))
        after = [
            record.figures(f"after, text {text}", replace(run, seed=seed), lambda run: train_and_measure(run, args))
            for seed in args.seed
        ]
        table[storage] = {"before": before, "after": after}
        print_line(storage, before, after, headline)
    figures: dict[str, Any] = {"task": args.task, "text": Path(args.text or args.eval).name, "storages": table}
    if "nf4" in table and "fp4" in table:
        nf4, fp4 = (table[name]["before"]["relative_error"] for name in ("nf4", "fp4"))
        figures |= {"nf4_error": nf4, "fp4_error": fp4, "nf4_vs_fp4_error": nf4 / fp4}
    closing_line(figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.set_defaults(train_rows=480, eval_rows=100)
    parser.add_argument("--storage", nargs="+", choices=list(STORAGES), default=list(STORAGES))
    parser.add_argument("--text", help="rows of held-out text, in any form that a recipe's data.eval may have")
    parser.add_argument("--text-template", help='where they have other columns than text: "{title}\\n{body}"')
    parser.add_argument("--text-rows", type=int, help="only the first so many")
    parser.add_argument("--record", type=Path, metavar="FILE.jsonl", help="keep finished runs here, and go on from it")
    return parser.parse_args()


def error_of(run: Run) -> dict[str, Any]:
    """How far the weights moved; nothing moves if they are kept as they are."""
    from veneer.base.load import load_model
    from veneer.base.quantize import Quantizer
    from veneer.base.storage_config import base_storage
    from veneer.cli.quantize import Errors

    kept = base_storage(STORAGES[run.storage])
    if kept is None:
        return {"bits_per_weight": 16, "relative_error": 0.0, "worst_relative_error": 0.0, "largest_difference": 0.0}
    errors = Errors()
    load_model(run.model, furnish=Quantizer(kept, seen=errors))
    return errors.figures()


def both(run: Run, args: argparse.Namespace, adapter: Path | None = None) -> dict[str, Any]:
    """Perplexity of the text and the task's metrics."""
    loaded = opened(run, adapter)
    return {"perplexity": perplexity(run, loaded, args)} | scores(run, loaded)


def perplexity(run: Run, loaded: Any, args: argparse.Namespace) -> float:
    from veneer.data.render import Renderer
    from veneer.data.settings import DataSettings
    from veneer.data.sources import read_rows
    from veneer.tasks.causal_lm import CausalLM

    if args.text is None:
        data, rows = recipe_of(run).data, read_rows(args.eval, limit=args.eval_rows)
    else:
        data, rows = DataSettings(train=args.text, text=args.text_template), read_rows(args.text, limit=args.text_rows)
    examples = Renderer(loaded.tokenizer, data, run.max_length).render_all(rows).examples
    return CausalLM().held_out_loss(loaded, examples, packed=True, max_length=run.max_length).perplexity


def train_and_measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    with trained(run) as (adapter, figures):
        return figures | both(run, args, adapter)


def print_heading(headline: str) -> None:
    print(f"{'':8}{'bits a':>8}{'relative':>10}{'worst':>8}{'largest':>9}  {'perplexity':>25}  {headline:>22}")
    weights = f"{'storage':8}{'weight':>8}{'error':>10}{'layer':>8}{'diff.':>9}"
    print(f"{weights}  {'before':>9}{'after':>16}  {'before':>7}{'after':>15}{'n':>4}", flush=True)


def print_line(storage: str, before: dict[str, Any], after: Sequence[dict[str, Any]], headline: str) -> None:
    text, metric = [a["perplexity"] for a in after], [a[headline] for a in after]
    print(
        f"{storage:8}{before['bits_per_weight']:8.3f}{before['relative_error']:10.5f}"
        f"{before['worst_relative_error']:8.4f}{before['largest_difference']:9.4f}  {before['perplexity']:9.3f}"
        f"{mean(text):9.3f} +-{spread(text):4.2f}  {before[headline]:7.3f}{mean(metric):7.3f} +- {spread(metric):4.3f}"
        f"{len(after):4}",
        flush=True,
    )


if __name__ == "__main__":
    prepare_process()
    main()
