"""What does LoRA cost beside training all weights, and an adapter beside its base once it answers?

    python -m benchmarks.claims.costs train --tokens 512 [--steps 4]
    python -m benchmarks.claims.costs answer --tokens 16 [--rounds 9]

LoRA, arXiv:2106.09685: a third of the memory and 25 % less time in training, checkpoints 10,000 times smaller (GPT-3);
table 1: bottleneck adapters add 21 to 30 % to a forward pass of 128 tokens, batch 1, and a merged LoRA adds nothing.

train: all linear layers of the model, one row of text a step; the first step is a warm-up. `optimizer_bytes` is AdamW's
state, `saved_bytes` the adapter's folder, `peak_bytes` the process's resident memory at most, each method in a process
of its own.  answer: greedy generation after a short prompt, in turns; ratios are taken round by round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.report import closing_line
from veneer.machine import peak_rss_bytes, prepare_process

TRAINED: dict[str, Mapping[str, Any]] = {
    "LoRA r 8": {"name": "lora", "rank": 8},
    "LoRA r 1": {"name": "lora", "rank": 1},
    "full": {"name": "full"},
}
ADAPTERS: dict[str, tuple[Mapping[str, Any], Any]] = {
    "LoRA unmerged": ({"name": "lora", "rank": 16}, "all-linear"),
    "Houlsby": ({"name": "bottleneck", "variant": "houlsby", "size": 16}, ("o_proj", "down_proj")),
    "Pfeiffer": ({"name": "bottleneck", "variant": "pfeiffer", "size": 16}, ("down_proj",)),
}
"""Method and targets of what stays beside the weights when it answers."""


def main() -> None:
    args = arguments()
    if args.side is not None:
        print(json.dumps(trained(args, args.side)), flush=True)
        return
    if args.what == "answer":
        closing_line({"answer": answered(args)})
        return
    sides = {}
    for side in TRAINED:
        command = [sys.executable, "-m", "benchmarks.claims.costs", *sys.argv[1:], "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sides[side] = json.loads(done.stdout.splitlines()[-1])
    closing_line({"train": sides})


def trained(args: argparse.Namespace, side: str) -> dict[str, float]:
    """Costs of one method's training."""
    import torch

    from veneer.recipe.load import recipe_from
    from veneer.train.checkpoint import TrainState
    from veneer.train.job import read_job
    from veneer.train.optim import build_optimizer
    from veneer.train.preflight import preflight
    from veneer.train.setup import set_up
    from veneer.train.step import optimizer_step

    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text(json.dumps({"text": "one two three " * args.tokens}) + "\n", encoding="utf-8")
        shape = {
            "max_length": args.tokens,
            "tokens_per_step": args.tokens,
            "steps": args.steps + 1,
            "dtype": args.dtype,
        }
        tree = {"model": args.model, "data": {"train": str(rows)}, "method": TRAINED[side], "train": shape}
        recipe = recipe_from({**tree, "run": str(Path(scratch) / "run")})
        training = set_up(preflight(read_job(recipe)))
        adapter = training.adapter
        state = TrainState(training.base, adapter, build_optimizer(adapter.named(), recipe.optimizer))
        seconds = [optimizer_step(training, state)["seconds"] for _ in range(args.steps + 1)][1:]
        moments = [t for s in state.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        return {
            "parameters": adapter.n_params(),
            "optimizer_bytes": sum(t.numel() * t.element_size() for t in moments),
            "step_seconds": statistics.median(seconds),
            "peak_bytes": peak_rss_bytes(),
            "saved_bytes": adapter.save(Path(scratch) / "adapter"),
        }


def answered(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of one answer, and over the base's, by what answers: medians, with the ratios' quartiles."""
    from veneer.adapters.attach import attach
    from veneer.base.base import Base
    from veneer.base.load import load_model
    from veneer.generate.engine import generate
    from veneer.methods.base import config_from

    base, folded = (load_model(args.model, dtype=args.dtype) for _ in range(2))
    _fold_in_place(folded.network)
    turns: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]]]] = {
        "merged LoRA": (folded.network, nullcontext)
    }
    for name, (method, targets) in ADAPTERS.items():
        config = config_from(method["name"], {k: v for k, v in method.items() if k != "name"})
        adapter = attach(base.network, config, targets).eval().detach()
        turns[name] = (base.network, lambda adapter=adapter: _Attached(adapter))
    turns["base"] = (base.network, nullcontext)
    prompt = base.tokenizer("Once upon a time there was a small language model that")["input_ids"]
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(args.rounds + 1):
        for name, (model, around) in turns.items():
            with around():
                began = time.perf_counter()
                generate(Base.of(model), [prompt], max_new_tokens=args.tokens, stop_ids=())
            if round_:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    return {name: _ratios(times, seconds["base"]) for name, times in seconds.items()}


class _Attached:
    """An adapter on its model for a while."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    def __enter__(self) -> None:
        self._adapter.attach()

    def __exit__(self, *_: object) -> None:
        self._adapter.detach()


def _fold_in_place(model: Any) -> None:
    """Give the model the weights that a merged random LoRA has."""
    import torch

    from veneer.adapters.attach import attach
    from veneer.methods.lora import LoRAConfig

    adapter = attach(model, LoRAConfig(rank=16, init="random")).eval().detach()
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            weight = model.get_submodule(path).weight
            weight.copy_(delta.fold(weight.float()))


def _ratios(times: list[float], base: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles([t / b for t, b in zip(times, base, strict=True)], n=4)
    return {"seconds": statistics.median(times), "vs_base": middle, "vs_base_low": low, "vs_base_high": high}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "answer"])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, required=True, help="of a row, or of an answer")
    parser.add_argument("--side", choices=sorted(TRAINED), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    prepare_process()
    main()
