"""Does a 33B fit into 24 GiB, and a 65B onto a disk?  Real steps on a made LLaMA of that shape, by veneer's own loop.

    python benchmarks/large_models.py --shape 33b [--rank 64] [--steps 3] [--layers N] [--page-weights] [--folder DIR]
    python benchmarks/large_models.py --shape 65b --rank 16 --steps 1

Writes the model straight as a 4-bit folder (NF4 with double quantization, 17 GB or 34 GB; the disk is asked first),
trains LoRA on all linear layers with rows of 512 tokens, one a step, blocks recomputed, and removes everything, also
when interrupted. A 65B's weights are paged; `--page-weights` pages a 33B's too. `--layers N` runs a slice of N layers.

GFLOP/s counts what a step computes: products with W forward, recomputed, and for the gradient of their input; four
passes of the adapters, of which two are for gradients; the head forward and back; attention's two products. The rate it
is held against is that of torch's bfloat16 `linear` at the feed-forward's shape, measured before and after.

QLoRA, arXiv:2305.14314, says 33B in 24 GB and 65B in 48 GB. The last line is JSON.
"""

import argparse
import json
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import closing_line

from veneer.machine import peak_rss_bytes, prepare_process, reset_peak_rss

BEGAN = time.perf_counter()
GIB = 2**30


def main() -> None:
    args = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("ended by a signal; everything is removed"))
    import torch
    from synthetic import SHAPES, write_model, write_rows

    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers)
    parameters = shape.adapter_parameters(args.rank)
    room = shape.quantized_bytes + shape.dense_bytes + 4 * parameters + GIB
    root = Path(args.folder or tempfile.gettempdir())
    free = shutil.disk_usage(root).free
    if free < room:
        sys.exit(f"{root} has {free / GIB:.1f} GiB free, {room / GIB:.1f} GiB are needed; name another with --folder")
    say(f"{args.shape}: {shape.layers} layers, {shape.weights / 1e9:.2f}G weights in linear layers, rank {args.rank}: ")
    say(f"{parameters / 1e6:.1f}M parameters; {room / GIB:.1f} GiB of disk needed, {free / GIB:.1f} free in {root}")
    with tempfile.TemporaryDirectory(prefix="veneer-giant-", dir=root) as scratch:
        folder = Path(scratch)
        write_model(folder / "model", shape, say)
        write_rows(folder / "rows.jsonl", args.steps, args.tokens, shape.vocab_size)
        say("model written")
        rate = matmul_rate(torch, shape, args.tokens)
        say(f"torch's bfloat16 linear: {rate:.0f} GFLOP/s")
        begin = memory()
        reset_peak_rss()
        figures = trained(args, folder, shape)
        rate = (rate + matmul_rate(torch, shape, args.tokens)) / 2
    work = flop(shape, args.rank, args.tokens) / 1e9
    seconds = statistics.median(figures["seconds_by_step"])
    figures |= {
        "before_loading_bytes": begin["anonymous"] + begin["file"],
        "seconds_a_step": seconds,
        "gflops": work / seconds,
        "matmul_gflops": rate,
        "share_of_matmul_rate": work / seconds / rate,
        "peak_bytes": peak_rss_bytes(),
        "swapped_bytes": memory()["swapped"],
        **{key: getattr(args, key) for key in ("shape", "rank", "tokens")},
        "layers": shape.layers,
        "linear_weights": shape.weights,
    }
    say(f"{seconds:.2f} s a step, {work / seconds:.0f} GFLOP/s: {100 * work / seconds / rate:.0f}% of {rate:.0f}")
    say(f"peak {figures['peak_bytes'] / GIB:.2f} GiB resident, {figures['swapped_bytes']} bytes swapped")
    closing_line(figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("33b", "65b"), default="33b")
    parser.add_argument("--layers", type=int, default=0, help="a slice of so many; 0 for all")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--page-weights", action="store_true", help="for a 65B they always are")
    parser.add_argument("--page-activations", action="store_true")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 32), help="of the optimizer's state")
    parser.add_argument("--buffered", action="store_true", help="keep a buffer of all gradients")
    parser.add_argument("--folder", help="where the model is written; by default the temporary folder")
    return parser.parse_args()


def say(text: str) -> None:
    now = memory()
    resident = f"{now['anonymous'] / GIB:.2f} + {now['file'] / GIB:.2f} GiB"
    print(f"[{time.perf_counter() - BEGAN:7.1f} s, {resident}] {text}", flush=True)


def memory() -> dict[str, int]:
    """Resident bytes of this process, its own and mapped files' (which the system may drop), and swapped ones."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    names = {"anonymous": "RssAnon", "file": "RssFile", "swapped": "VmSwap"}
    return {key: 1024 * int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for key, name in names.items()}  # type: ignore[index]


def matmul_rate(torch: Any, shape: Any, tokens: int) -> float:
    """GFLOP/s of a dense bfloat16 feed-forward product, the median of seven."""
    x = torch.randn(tokens, shape.hidden).bfloat16()
    w = torch.randn(shape.ffn, shape.hidden, dtype=torch.bfloat16)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * shape.hidden * shape.ffn / statistics.median(seconds[1:]) / 1e9


def flop(shape: Any, rank: int, tokens: int) -> float:
    """Floating-point operations of a step."""
    linears = 3 * 2 * tokens * shape.weights
    adapters = 4 * 2 * tokens * shape.adapter_parameters(rank)
    head = 2 * 2 * tokens * shape.vocab_size * shape.hidden
    attention = shape.layers * 4 * 2 * 2 * tokens * tokens * shape.hidden
    return float(linears + adapters + head + attention)


def in_backward(args: argparse.Namespace) -> bool:
    """Whether each gradient is used as soon as it is there; older versions of veneer keep all of them."""
    from veneer.recipe.settings import OptimizerSettings

    return not args.buffered and "in_backward" in OptimizerSettings.model_fields


def recipe_of(args: argparse.Namespace, folder: Path) -> Any:
    from veneer.recipe.load import recipe_from

    return recipe_from(
        {
            "model": str(folder / "model"),
            "run": str(folder / "run"),
            "data": {"train": str(folder / "rows.jsonl")},
            "method": {"name": "lora", "rank": args.rank},
            "optimizer": {"bits": args.bits, **({"in_backward": True} if in_backward(args) else {})},
            "memory": {
                "page_weights": args.page_weights or args.shape == "65b",
                "page_activations": args.page_activations,
            },
            "train": {
                "steps": args.steps,
                "tokens_per_step": args.tokens,
                "micro_batch_tokens": args.tokens,
                "max_length": args.tokens,
                "dtype": "bfloat16",
                "recompute": True,
                "clip": 0,  # the norm of gradients that are used at once would take a second pass
                "checkpoint_every": 0,
            },
        }
    )


def trained(args: argparse.Namespace, folder: Path, shape: Any) -> dict[str, Any]:
    """Figures of the run: seconds by step, and bytes by part."""
    from veneer.train.run import train_recipe

    seconds: list[float] = []
    own: list[int] = []

    def step(event: Any) -> None:
        seconds.append(event.figures["seconds"])
        own.append(memory()["anonymous"])
        say(f"step {event.step}: {seconds[-1]:.2f} s, loss {event.figures['loss']:.3f}")

    recipe = recipe_of(args, folder)
    _, training = train_recipe(recipe, [step], say)
    say("adapter written")
    assert training is not None and [len(e) for e in training.job.examples] == [args.tokens] * args.steps
    parts = by_part(args, shape, training, recipe)
    for name, size in parts.items():
        say(f"  {name:<12} {size / GIB:8.3f} GiB")
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    return {"seconds_by_step": seconds, "parts": parts, "own_bytes": max(own), "loss": losses}


def by_part(args: argparse.Namespace, shape: Any, training: Any, recipe: Any) -> dict[str, int]:
    """Bytes of each part that can be counted."""
    from veneer.storage import Storage

    stored: dict[int, int] = {}
    for module in training.base.network.modules():
        if isinstance(module, Storage):
            for buffer in module.buffers():
                whole = buffer.untyped_storage()
                paged = recipe.memory.page_weights and buffer.nbytes >= 4096
                stored[whole.data_ptr() if paged else buffer.data_ptr()] = whole.nbytes() if paged else buffer.nbytes
    adapters = sum(p.nbytes for p in training.adapter.parameters())
    return {
        "base": sum(stored.values()) + sum(p.nbytes for p in training.base.network.parameters()),
        "adapters": adapters,
        "gradients": 0 if in_backward(args) else adapters,
        "optimizer": 2 * adapters if args.bits == 32 else int(2.03 * adapters / 4),
        "activations": 0 if args.page_activations else 2 * shape.layers * args.tokens * shape.hidden,
    }


if __name__ == "__main__":
    prepare_process()
    main()
