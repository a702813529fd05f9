"""Does a merged model answer as fast as its base, and what does an adapter that stays unmerged cost?

    python benchmarks/merged_latency.py [--rank 16] [--rounds 15] [--tokens 32]

LoRA, arXiv:2106.09685, section 4.1: no additional inference latency once merged. One process holds base, merged model
and base with the adapter attached; they take turns, one greedy generation each, and the ratios are taken round by
round. Figures are medians, with the quartiles beside them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import closing_line

from veneer.machine import prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    seconds = measured(args)
    ratios = {
        name: [other / base for other, base in zip(seconds[name], seconds["base"], strict=True)]
        for name in ("merged", "unmerged")
    }
    figures: dict[str, Any] = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        figures |= {f"{name}_vs_base": middle, f"{name}_vs_base_quartiles": [low, high]}
    closing_line(figures)


def measured(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round, by model."""
    from veneer.adapters.attach import attach
    from veneer.base.load import load_model
    from veneer.generate.engine import generate
    from veneer.merge.fold import merge
    from veneer.methods.lora import LoRAConfig

    base, own = load_model(args.model), load_model(args.model)
    adapter = attach(own.model, LoRAConfig(rank=args.rank, init="random")).eval()
    with tempfile.TemporaryDirectory() as scratch:
        merge(adapter, own.path, Path(scratch) / "merged")
        merged = load_model(Path(scratch) / "merged", dtype=base.network.dtype)
    prompt = base.tokenizer("Once upon a time there was a small language model that")["input_ids"]
    seconds: dict[str, list[float]] = {"base": [], "merged": [], "unmerged": []}
    for round_ in range(args.rounds + 1):
        for name, loaded in (("base", base), ("merged", merged), ("unmerged", own)):
            began = time.perf_counter()
            generate(loaded, [prompt], max_new_tokens=args.tokens, stop_ids=())
            if round_:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    prepare_process()
    main()
