"""What does AdamW's state take, how long is a step, and do 8 bits learn as 32 do?

    python benchmarks/optimizers.py [--numbers 5000000 100000000] [--threads 1 2] [--rounds 9]
    python benchmarks/optimizers.py --rows FILE [--steps 300] [--seeds 3] [--tokens 128]

The first compares steps over one buffer of so many numbers, all in one process, in turns: veneer's 8-bit and 32-bit
AdamW, torch's fused and foreach, bitsandbytes' AdamW8bit on the CPU. Times are medians.  The second trains SmolLM2 on
rows of prompts and completions with 32 and with 8 bits from the same seeds, and compares the mean loss over the last
quarter of the steps.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import closing_line

from veneer.machine import prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[5_000_000, 100_000_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", help="JSONL of prompts and completions; trains instead of timing")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="a step")
    args = parser.parse_args()
    closing_line(trained(args) if args.rows else timed(args))


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of each optimizer, and the worst of each ratio over all sizes and threads."""
    import torch

    seconds: dict[str, dict[str, float]] = {}
    figures: dict[str, Any] = {}
    for numbers in args.numbers:
        steppers, figures["state_bytes_per_parameter"] = optimizers(numbers)
        for threads in args.threads:
            torch.set_num_threads(threads)
            taken: dict[str, list[float]] = {name: [] for name in steppers}
            for turn in range(args.rounds + 1):
                for name, step in steppers.items():
                    if "bitsandbytes" in name and turn > 2:  # slow enough to be measured twice
                        continue
                    began = time.perf_counter()
                    step()
                    taken[name].append(time.perf_counter() - began)
            medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
            seconds[f"{numbers} numbers, {threads} threads"] = medians
            for name, value in medians.items():
                print(f"{numbers:>11} numbers  {threads} threads  {name:<24} {value * 1e3:9.2f} ms", flush=True)
    rows = seconds.values()
    figures["time_vs_torch_fused"] = max(r["veneer 8 bits"] / r["torch fused"] for r in rows)
    figures["time_vs_torch_fused_32_bits"] = max(r["veneer 32 bits"] / r["torch fused"] for r in rows)
    figures["speedup_vs_bitsandbytes"] = min(r["bitsandbytes AdamW8bit"] / r["veneer 8 bits"] for r in rows)
    return {**figures, "seconds": seconds}


def optimizers(numbers: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """A step of each, over a matrix of so many numbers of its own; and the bytes of 8-bit state a number."""
    import bitsandbytes
    import torch
    from torch import nn

    from veneer.adapters.part import NamedParameter
    from veneer.recipe.settings import OptimizerSettings
    from veneer.train.optim import build_optimizer
    from veneer.train.optim.adamw import FlatAdamW

    gradient = torch.randn(numbers, generator=torch.Generator().manual_seed(1))

    def parameter() -> nn.Parameter:
        made = nn.Parameter(torch.randn(numbers, generator=torch.Generator().manual_seed(0)))
        made.grad = gradient
        return made

    ours = [
        build_optimizer([NamedParameter("layer", "a", "in", parameter())], OptimizerSettings(bits=bits))
        for bits in (8, 32)
    ]
    assert isinstance(ours[0], FlatAdamW)
    others = {
        "torch fused": torch.optim.AdamW([parameter()], fused=True),
        "torch foreach": torch.optim.AdamW([parameter()], foreach=True),
        "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit([parameter()]),
    }
    steppers = {"veneer 8 bits": ours[0].step, "veneer 32 bits": ours[1].step}
    return {**steppers, **{name: o.step for name, o in others.items()}}, ours[0].state_bytes() / numbers


def trained(args: argparse.Namespace) -> dict[str, Any]:
    """Mean loss over the last quarter of the steps, for each seed with 32 and with 8 bits."""
    from veneer.recipe.load import recipe_from
    from veneer.train.run import train_recipe

    recipe: dict[str, Any] = {
        "model": args.model,
        "data": {"train": args.rows},
        "method": {"name": "lora", "rank": 8},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": args.steps, "tokens_per_step": args.tokens, "max_length": args.tokens},
    }
    losses: dict[str, list[float]] = {"32": [], "8": []}
    apart = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            curves = {}
            for bits in (32, 8):
                tree = copy.deepcopy(recipe)
                tree["run"] = str(Path(folder) / f"{bits}-{seed}")
                tree["optimizer"]["bits"], tree["train"]["seed"] = bits, seed
                train_recipe(recipe_from(tree))
                lines = (Path(tree["run"]) / "events.jsonl").read_text(encoding="utf-8").splitlines()
                curves[bits] = [e["loss"] for e in map(json.loads, lines) if e["event"] == "step"]
                losses[str(bits)].append(statistics.mean(curves[bits][-args.steps // 4 :]))
                print(f"seed {seed}  {bits:>2} bits  loss {losses[str(bits)][-1]:.4f}", flush=True)
            apart.append(max(abs(a - b) for a, b in zip(curves[32], curves[8], strict=True)))
    return {
        "loss_by_bits": losses,
        "loss_8_minus_32_bits": [b - a for a, b in zip(losses["32"], losses["8"], strict=True)],
        "largest_difference_at_a_step": apart,
        "steps": args.steps,
    }


if __name__ == "__main__":
    prepare_process()
    main()
