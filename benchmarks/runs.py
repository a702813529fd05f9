"""One adapter trained on one task with one seed, and measured: what tasks.py and quantization.py are made of.

Each training is a process of its own, so that its time and its largest resident memory are its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.machine import prepare_process


@dataclass(frozen=True)
class Task:
    """How rows of one task are read and scored."""

    prompt: str
    completion: str
    metrics: tuple[str, ...]
    headline: str
    """What figures call its first metric."""
    lr: float
    reference: str | None = None
    max_new_tokens: int = 96
    ignore_case: bool = False


TASKS = {
    "wikisql": Task("{schema}\n{question}", "{sql}", ("sql",), "execution", 2e-3, ignore_case=True),
    "mathword": Task("{question}", "{equation}", ("numeric",), "numeric", 1e-3, reference="answer", max_new_tokens=40),
    "e2e_nlg": Task("{mr}", "{text}", ("rouge_l", "bleu"), "rouge_l", 1e-3, reference="refs", max_new_tokens=80),
}

STORAGES: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense"},
    "nf4": {"name": "nf4", "double_quant": False},
    "nf4+dq": {"name": "nf4", "double_quant": True},
    "fp4": {"name": "fp4", "double_quant": False},
    "fp4+dq": {"name": "fp4", "double_quant": True},
    "int8": {"name": "int8"},
}
"""How the frozen weights may be kept, by the names the tables use; +dq is double quantization."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that decides what a training comes to; written down with its figures."""

    task: str
    train: str
    eval: str
    train_rows: int | None
    eval_rows: int | None
    model: str
    storage: str
    method: str
    rank: int
    alpha: float
    lr: float
    lr_ratio: float
    epochs: float
    tokens_per_step: int
    max_length: int
    seed: int


def recipe_of(run: Run, folder: Path = Path()) -> Any:
    from veneer.recipe.load import recipe_from

    task = TASKS[run.task]
    data = {"train": run.train, "rows": run.train_rows, "prompt": task.prompt, "completion": task.completion}
    train = {"epochs": run.epochs, "tokens_per_step": run.tokens_per_step, "max_length": run.max_length}
    return recipe_from(
        {
            "model": run.model,
            "storage": STORAGES[run.storage],
            "method": {"name": run.method, "rank": run.rank, "alpha": run.alpha},
            "data": data | {"format": "plain"},
            "optimizer": {"lr": run.lr, "lr_ratio": run.lr_ratio},
            "train": train | {"seed": run.seed, "checkpoint_every": 0},
            "run": str(folder / "run"),
        }
    )


@contextmanager
def trained(run: Run, side: str = "veneer") -> Iterator[tuple[Path, dict[str, Any]]]:
    """Train in a process of its own: the adapter's folder, removed afterwards, and the figures.

    side    veneer, or peft, which gets torch's defaults for threads, as its users would
    """
    environment = dict(os.environ)
    if side == "peft":
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            environment.pop(name, None)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, side, json.dumps(asdict(run)), scratch]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        yield Path(figures.pop("adapter")), figures


def opened(run: Run, adapter: Path | None = None) -> Any:
    """The run's base model in its storage, with the adapter if there is one."""
    from veneer.adapters.attach import load_adapter
    from veneer.base.load import load_model
    from veneer.base.storage_config import base_storage

    loaded = load_model(run.model, storage=base_storage(STORAGES[run.storage]))
    if adapter is not None:
        load_adapter(loaded, adapter)
    return loaded


def scores(run: Run, loaded: Any) -> dict[str, float]:
    """The task's metrics of a model on the held-out rows, the headline first."""
    from veneer.data.render import Renderer
    from veneer.data.sources import read_rows
    from veneer.evaluate.metrics import MetricOptions
    from veneer.evaluate.runner import EvalSettings, evaluate

    task = TASKS[run.task]
    settings = EvalSettings(
        metrics=task.metrics,
        max_new_tokens=task.max_new_tokens,
        reference=task.reference,
        options=MetricOptions(ignore_case=task.ignore_case),
    )
    renderer = Renderer(loaded.tokenizer, recipe_of(run).data, run.max_length)
    found = evaluate(loaded, read_rows(run.eval, limit=run.eval_rows), renderer, settings)
    return {task.headline: found.metrics[task.metrics[0]]} | {name: found.metrics[name] for name in task.metrics[1:]}


def train_here(run: Run, scratch: Path) -> dict[str, Any]:
    import torch

    from veneer.cli.console import remark
    from veneer.cli.train import TrainProgress
    from veneer.train.run import train_recipe

    with TrainProgress() as progress:
        outcome, _ = train_recipe(recipe_of(run, scratch), [progress], remark)
    return {
        "adapter": outcome.adapter,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "peak_bytes": outcome.peak_bytes,
        "steps": outcome.steps,
        "loss": outcome.loss,
        "trained_parameters": outcome.trained_parameters,
        "threads": torch.get_num_threads(),
    }


def collate_padded(examples: Sequence[Any], pad_id: int) -> tuple[Any, Any, Any]:
    """One row a document, padded on the right.

    Returns input_ids, attention_mask and labels, each (B, T) int64; labels are -100 where nothing is trained and stand
    at their token's own place, as transformers' models expect.
    """
    import numpy as np
    import torch

    longest = max(len(e) for e in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        ids[row, : len(example)] = tokens
        attention[row, : len(example)] = 1
        labels[row, : len(example)] = tokens.where(torch.from_numpy(example.supervised.copy()), torch.tensor(-100))
    return ids, attention, labels


def train_with_peft(run: Run, scratch: Path) -> dict[str, Any]:
    """As their documentation shows it: padded batches of 8 rows, bfloat16 weights, AdamW, a linear schedule."""
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

    from veneer.data.render import Renderer
    from veneer.data.sources import read_rows
    from veneer.machine import peak_rss_bytes
    from veneer.models.sources import resolve

    torch.manual_seed(run.seed)
    folder = resolve(run.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LoraConfig(r=run.rank, lora_alpha=run.alpha, target_modules="all-linear")
    model = get_peft_model(model, config)
    rows = read_rows(run.train, limit=run.train_rows)
    examples = Renderer(tokenizer, recipe_of(run).data, run.max_length).render_all(rows).examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(run.seed)).tolist()
    batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    steps = round(run.epochs * len(batches))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    model.train()
    began, tokens, loss = time.perf_counter(), 0, float("nan")
    for step in range(steps):
        members = [examples[i] for i in batches[step % len(batches)]]
        ids, mask, labels = collate_padded(members, tokenizer.pad_token_id or 0)
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens, loss = tokens + int(mask.sum()), out.loss.item()
        if step % 20 == 0:
            print(f"peft: step {step + 1}/{steps} loss {loss:.3f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    model.save_pretrained(scratch)
    figures = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": peak_rss_bytes()}
    return {"adapter": str(scratch), "steps": steps, "loss": loss, **figures}


if __name__ == "__main__":
    prepare_process()
    side, settings, scratch = sys.argv[1:]
    train_side = {"veneer": train_here, "peft": train_with_peft}[side]
    print(json.dumps(train_side(Run(**json.loads(settings)), Path(scratch))), flush=True)
