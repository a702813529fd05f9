"""How good does a small model get on a real task, how fast, and in how much memory? Beside a plain PEFT run if asked.

    python benchmarks/tasks.py --task wikisql --train wikisql.train.jsonl.gz --eval wikisql.val.jsonl.gz \\
        --train-rows 1600 --eval-rows 200 --peer

Tasks: wikisql (rows with question, schema, sql, rows; execution accuracy), mathword (question, equation, answer; the
equation's value), e2e_nlg (mr, text; refs for evaluation; ROUGE-L and BLEU). Each side trains in a process of its own,
one after the other, on the same tokens in the same session; `seconds` and `peak_bytes` are of training, loading
excluded from the first and included in the second. The peer is transformers + peft as their documentation shows it:
padded batches of 8 rows, bfloat16 weights, AdamW, a linear schedule; its adapter is then loaded here and measured
like ours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import closing_line

from veneer.machine import prepare_process


@dataclass(frozen=True)
class Task:
    """How rows of one task are read and scored."""

    prompt: str
    completion: str
    metrics: tuple[str, ...]
    headline: str
    """What the closing JSON calls its first metric."""
    lr: float
    reference: str | None = None
    max_new_tokens: int = 96
    ignore_case: bool = False


TASKS = {
    "wikisql": Task("{schema}\n{question}", "{sql}", ("sql",), "execution", 2e-3, ignore_case=True),
    "mathword": Task("{question}", "{equation}", ("numeric",), "numeric", 1e-3, reference="answer", max_new_tokens=40),
    "e2e_nlg": Task("{mr}", "{text}", ("rouge_l", "bleu"), "rouge_l", 1e-3, reference="refs", max_new_tokens=80),
}


def main() -> None:
    args = arguments()
    if args.side:
        print(json.dumps({"veneer": train_here, "peft": train_with_peft}[args.side](args)), flush=True)
        return
    task = TASKS[args.task]
    figures: dict[str, Any] = {"task": args.task, "rank": args.rank, "lr": args.lr or task.lr, "epochs": args.epochs}
    with tempfile.TemporaryDirectory() as scratch:
        for side in ["veneer", *(["peft"] if args.peer else [])]:
            prefix = "" if side == "veneer" else "peft_"
            side_figures = in_process_of_its_own(side, Path(scratch) / side)
            figures |= {f"{prefix}{k}": v for k, v in side_figures.items() if k != "adapter"}
            before, after = measure(args, side_figures["adapter"], before=side == "veneer")
            if before is not None:
                figures |= {f"{task.headline}_before": before[task.metrics[0]]}
            figures |= {f"{prefix}{task.headline}_after": after[task.metrics[0]]}
            figures |= {f"{prefix}{name}_after": after[name] for name in task.metrics[1:]}
            print(json.dumps(figures), file=sys.stderr, flush=True)
    if args.peer:
        figures["time_vs_peft"] = figures["seconds"] / figures["peft_seconds"]
        figures["memory_vs_peft"] = figures["peak_bytes"] / figures["peft_peak_bytes"]
    closing_line(figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="train the same rows with plain peft too")
    parser.add_argument("--side", choices=["veneer", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process_of_its_own(side: str, scratch: Path) -> dict[str, Any]:
    """Train one side alone; the peer gets torch's defaults, as its users would."""
    environment = dict(os.environ)
    if side == "peft":
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            environment.pop(name, None)
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--scratch", str(scratch)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def recipe_of(args: argparse.Namespace) -> Any:
    from veneer.train.recipe import recipe_from

    task = TASKS[args.task]
    return recipe_from(
        {
            "model": args.model,
            "method": {"name": args.method, "rank": args.rank, "alpha": args.alpha or 2 * args.rank},
            "data": {
                "train": args.train,
                "rows": args.train_rows,
                "prompt": task.prompt,
                "completion": task.completion,
                "format": "plain",
            },
            "optimizer": {"lr": args.lr or task.lr, "lr_ratio": args.lr_ratio},
            "train": {
                "epochs": args.epochs,
                "tokens_per_step": args.tokens_per_step,
                "max_length": args.max_length,
                "seed": args.seed,
                "checkpoint_every": 0,
            },
            "run": str((args.scratch or Path()) / "run"),
        }
    )


def train_here(args: argparse.Namespace) -> dict[str, Any]:
    from veneer.cli.train import TrainProgress
    from veneer.train.loop import train

    with TrainProgress() as progress:
        outcome, _ = train(recipe_of(args), [progress], progress.say)
    return {
        "adapter": outcome.adapter,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "peak_bytes": outcome.peak_bytes,
        "steps": outcome.steps,
        "loss": outcome.loss,
        "trained_parameters": outcome.trained_parameters,
    }


def train_with_peft(args: argparse.Namespace) -> dict[str, Any]:
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

    from veneer.data.pack import collate_padded
    from veneer.data.render import Renderer
    from veneer.data.sources import read_rows
    from veneer.machine import peak_rss_bytes
    from veneer.models.load import resolve

    recipe = recipe_of(args)
    torch.manual_seed(args.seed)
    folder = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha or 2 * args.rank, target_modules="all-linear")
    model = get_peft_model(model, config)
    rows = read_rows(args.train, limit=args.train_rows)
    examples = Renderer(tokenizer, recipe.data, args.max_length).render_all(rows).examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed)).tolist()
    batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    steps = round(args.epochs * len(batches))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr or TASKS[args.task].lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    model.train()
    began, tokens, loss = time.perf_counter(), 0, float("nan")
    for step in range(steps):
        members = [examples[i] for i in batches[step % len(batches)]]
        ids, mask, labels = collate_padded(members, tokenizer.pad_token_id or 0)
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens, loss = tokens + int(mask.sum()), out.loss.item()
        if step % 20 == 0:
            print(f"peft: step {step + 1}/{steps} loss {loss:.3f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    model.save_pretrained(args.scratch)
    figures = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": peak_rss_bytes()}
    return {"adapter": str(args.scratch), "steps": steps, "loss": loss, **figures}


def measure(
    args: argparse.Namespace, adapter: str, *, before: bool
) -> tuple[dict[str, float] | None, dict[str, float]]:
    """The task's metrics of the base (if asked) and of the adapter on it."""
    from veneer.adapters.attach import load_adapter
    from veneer.data.render import Renderer
    from veneer.data.sources import read_rows
    from veneer.evaluate.metrics import MetricOptions
    from veneer.evaluate.tasks import EvalSettings, evaluate
    from veneer.models.load import load_model

    task = TASKS[args.task]
    loaded = load_model(args.model)
    rows = read_rows(args.eval, limit=args.eval_rows)
    renderer = Renderer(loaded.tokenizer, recipe_of(args).data, args.max_length)
    settings = EvalSettings(
        metrics=task.metrics,
        max_new_tokens=task.max_new_tokens,
        reference=task.reference,
        options=MetricOptions(ignore_case=task.ignore_case),
    )
    first = evaluate(loaded.model, loaded.tokenizer, rows, renderer, settings).metrics if before else None
    load_adapter(loaded.model, adapter)
    return first, evaluate(loaded.model, loaded.tokenizer, rows, renderer, settings).metrics


if __name__ == "__main__":
    prepare_process()
    main()
