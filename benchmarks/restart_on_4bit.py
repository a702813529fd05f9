"""What of a change is left when restarts fold it into a 4-bit weight, instead of keeping finished cycles beside it?

    python benchmarks/restart_on_4bit.py [--steps 24] [--every 6] [--lr 1e-3] [--model smollm2-135m-instruct]

Trains LoRA with restarts over an NF4 base on examples/tickets.jsonl, and takes every cycle's update U of every layer.
Then, per layer, from the weight W that was trained on (dequantized NF4, so it is exactly on its levels):

    in turn     W <- dequantize(quantize(W + U)) at each restart, as the authors of ReLoRA do with 8-bit weights
    at once     dequantize(quantize(W + all U)), from an exact sum that somebody would have to keep
    error       ||what W has changed by - all U|| / ||all U|| over all layers; 0 is all kept, 1 is as if none were
    drift       ||what W has changed by|| / ||W||, in turn as often, without any U: what double quantization adds

Updates are also taken 1/4 to 64 times as large, because a longer run or a higher rate makes them so, and the absmax is
also kept in 32 bits (plain). Beside means float32 factors: the error is 0 by construction, the memory is printed.
About 3 minutes on two busy cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import closing_line
from veneer.machine import prepare_process

ROOT = Path(__file__).parents[1]
SIZES = (0.25, 1.0, 4.0, 16.0, 64.0)


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        training = trained(args, Path(scratch) / "run")
    weights = {path: training.base.network.get_submodule(path).storage for path in training.adapter.deltas}
    cycles = {path: updates(delta, args.rank) for path, delta in training.adapter.deltas.items()}
    rows = [{"size": size, **errors(weights, cycles, size)} for size in SIZES]
    print(f"{'size':>5} {'change / weight':>16} {'in turn, after each cycle':>30} {'plain':>6} {'at once':>8}")
    for row in rows:
        told, plain = " ".join(f"{e:.3f}" for e in row["in_turn"]), row["plain"][-1]
        print(f"{row['size']:>5} {row['change_of_weight']:>16.5f} {told:>30} {plain:>6.3f} {row['at_once']:>8.3f}")
    still = drift(weights, len(rows[0]["in_turn"]))
    print(f"drift: {still:.5f}")
    n = len(next(iter(cycles.values())))
    beside = sum(4 * a.numel() + 4 * b.numel() for pairs in cycles.values() for a, b in pairs)
    kept = sum(storage.nbytes for storage in weights.values())
    print(f"beside: {beside} bytes after {n} cycles of rank {args.rank}; these layers in NF4: {kept}")
    closing_line(
        {"sizes": rows, "drift": still, "cycles": n, "rank": args.rank, "beside_bytes": beside, "nf4_bytes": kept}
    )


def trained(args: argparse.Namespace, run: Path) -> Any:
    from veneer.recipe.load import recipe_from
    from veneer.train.run import train_recipe

    recipe = {
        "model": args.model,
        "run": str(run),
        "storage": "nf4",
        "data": {
            "train": str(ROOT / "examples" / "tickets.jsonl"),
            "prompt": "Which team should answer this ticket? {ticket}",
            "completion": "{team}",
        },
        "method": {"name": "lora", "rank": args.rank, "alpha": 2 * args.rank},
        "optimizer": {"lr": args.lr},
        "restarts": {"every": args.every},
        "train": {"steps": args.steps, "tokens_per_step": 128, "warmup": 2, "checkpoint_every": 0, "dtype": "float32"},
    }
    outcome, training = train_recipe(recipe_from(recipe))
    print(f"trained {outcome.steps} steps in {outcome.seconds:.0f} s, loss {outcome.loss:.3f}")
    return training


def updates(delta: Any, rank: int) -> list[tuple[Tensor, Tensor]]:
    """A (R, D) and B (O, R), the scale in it, of each cycle."""
    a, b = delta.factors()
    return list(zip(a.split(rank), b.split(rank, dim=1), strict=True))


def errors(weights: dict[str, Any], cycles: dict[str, Any], size: float) -> dict[str, Any]:
    """The figures for updates `size` times as large, over all layers together (Frobenius norms)."""
    n = len(next(iter(cycles.values())))
    lost, plain, whole, at_once, weight = [0.0] * n, [0.0] * n, [0.0] * n, 0.0, 0.0
    for path, storage in weights.items():
        base = storage.dense(torch.float32)
        w, v, exact = base, base, torch.zeros_like(base)
        for i, (a, b) in enumerate(cycles[path]):
            update = size * (b @ a)
            exact += update
            w, v = requantized(storage, w + update), requantized(storage, v + update, double_quant=False)
            lost[i] += square(w - base - exact)
            plain[i] += square(v - base - exact)
            whole[i] += square(exact)
        at_once += square(requantized(storage, base + exact) - base - exact)
        weight += square(base)
    return {
        "change_of_weight": (whole[-1] / weight) ** 0.5,
        "in_turn": [(part / of) ** 0.5 for part, of in zip(lost, whole, strict=True)],
        "plain": [(part / of) ** 0.5 for part, of in zip(plain, whole, strict=True)],
        "at_once": (at_once / whole[-1]) ** 0.5,
    }


def drift(weights: dict[str, Any], times: int) -> float:
    """How far W goes by itself when it is quantized and dequantized so many times."""
    gone, weight = 0.0, 0.0
    for storage in weights.values():
        base = w = storage.dense(torch.float32)
        for _ in range(times):
            w = requantized(storage, w)
        gone, weight = gone + square(w - base), weight + square(base)
    return (gone / weight) ** 0.5


def requantized(storage: Any, w: Tensor, double_quant: bool = True) -> Tensor:
    """W as it is after it was kept in the storage's own 4 bits."""
    kept = type(storage)(storage.pack(w, storage.block, double_quant, "w"), storage.shape, storage.dtype)
    dense: Tensor = kept.dense(torch.float32)
    return dense


def square(t: Tensor) -> float:
    return float(t.square().sum(dtype=torch.float64))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6, help="steps of a cycle")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    prepare_process()
    main()
