"""Does paging let a run finish where memory is short, with the same adapter, and what does it cost?

    python benchmarks/paged.py [--limits 840,820,800] [--steps 3] [--layers 24] [--rank 192] [--quick]

A made LLaMA (24 layers of 1024, 0.3G weights, 0.16 GB in NF4) is trained in memory cgroups that this script makes and
removes (version 1 or 2; it has to be allowed to). LoRA of a high rank gives AdamW 0.73 GB of 32-bit state, so that
state and weights together exceed every limit. For each limit (MiB) two processes of their own train: one keeps all in
memory and is killed by the kernel, the other pages weights, activations and state and finishes. Gradients are used at
once (`optimizer.in_backward`) by both. Each finds no cached weights, so it quantizes the base inside the limit too. One
more run, without paging or limit, gives the adapter that the others must equal byte for byte, and the time they are
held against. `--quick` tries one limit and a smaller model with a higher rank. Without the C library (VENEER_NATIVE=0)
that limit and rank are higher: plain torch unpacks whole matrices to float32 where the kernels unpack a few rows, which
no paging takes away (measured: 881 MiB of that paged run are no file pages; with the library, at rank 288, 694).

The last line is JSON: `killed` and `finished` say of each limit how the run without and with paging ended, `equal`
whether the adapters are, `slowdown` how many times as long a paged step took (median; the first is left out).
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory_group import memory_group
from report import closing_line

from veneer.machine import peak_rss_bytes, prepare_process

MIB = 2**20
KILLED = 128 + 9
QUICK = {True: (352, "910"), False: (480, "1240")}
"""Rank and limit (MiB) of `--quick`, with and without the C library: weights and state exceed the limit, what has to
stay in memory does not (by 60 MiB or more; with the library by 110, as 800 MiB are enough)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", default="")
    parser.add_argument("--steps", type=int, default=0, help="2 if quick, else 3")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "RUN", "PAGED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, steps=args.steps, rank=args.rank)
        return
    steps = args.steps or (2 if args.quick else 3)
    from veneer.kernels import native  # after prepare_process: it loads torch

    own_rank, own_limits = QUICK[native.library() is not None] if args.quick else (192, "840,820,800")
    limits = [int(limit) for limit in (args.limits or own_limits).split(",")]
    with memory_group(limits[0] * MIB):
        pass  # refused before anything is written
    from synthetic import Shape, write_model, write_rows

    with tempfile.TemporaryDirectory(prefix="veneer-paged-") as scratch:
        folder = Path(scratch)
        shape = Shape(args.layers or (16 if args.quick else 24), 1024, 2816, 8, vocab_size=1000)
        write_model(folder / "model", shape, quantized=False)
        write_rows(folder / "rows.jsonl", steps, 64, shape.vocab_size)
        rank = args.rank or own_rank
        parts = {"quantized_bytes": shape.quantized_bytes, "state_bytes": 8 * shape.adapter_parameters(rank)}
        whole = sum(parts.values()) / MIB
        print(f"weights and optimizer state: {whole:.0f} MiB, limits: {limits}", flush=True)
        if whole <= max(limits):
            sys.exit("the limits are not below what weights and state take; lower --limits or raise --rank")
        closing_line({**parts, **compared(folder, limits, steps, rank)})


def compared(folder: Path, limits: list[int], steps: int, rank: int) -> dict[str, Any]:
    """The run in memory, then each limit without and with paging."""
    whole = run(folder, "whole", paged=False, limit=None, steps=steps, rank=rank)
    if whole["status"]:
        sys.exit(f"the run without a limit failed:\n{whole['stderr']}")
    print(f"without a limit: {whole['step']:.2f} s a step, peak {whole['peak'] / MIB:.0f} MiB", flush=True)
    found: dict[str, list[Any]] = {"killed": [], "finished": [], "equal": [], "slowdown": [], "peak_bytes": []}
    for limit in limits:
        plain = run(folder, f"plain-{limit}", paged=False, limit=limit, steps=steps, rank=rank)
        paged = run(folder, f"paged-{limit}", paged=True, limit=limit, steps=steps, rank=rank)
        found["killed"].append(plain["status"] == KILLED)
        found["finished"].append(paged["status"] == 0)
        found["equal"].append(paged.get("adapter") == whole["adapter"])
        found["slowdown"].append(paged["step"] / whole["step"] if "step" in paged else None)
        found["peak_bytes"].append(paged.get("peak"))
        ending = "killed" if plain["status"] == KILLED else f"status {plain['status']}"
        if paged["status"]:
            print(f"{limit} MiB: in memory {ending}; paged status {paged['status']}\n{paged['stderr']}", flush=True)
            continue
        print(
            f"{limit} MiB: in memory {ending}; paged finished, adapter {'equal' if found['equal'][-1] else 'DIFFERS'}, "
            f"{paged['step']:.2f} s a step ({found['slowdown'][-1]:.2f} times), peak {paged['peak'] / MIB:.0f} MiB",
            flush=True,
        )
    return {"limits_mib": limits, **found, "seconds_a_step": whole["step"], "unlimited_peak_bytes": whole["peak"]}


def run(folder: Path, name: str, *, paged: bool, limit: int | None, steps: int, rank: int) -> dict[str, Any]:
    """How a process that trains in `folder` ended; its figures if it did."""
    own = [str(folder / "model"), str(folder / name), "yes" if paged else "no"]
    command = [sys.executable, __file__, "--steps", str(steps), "--rank", str(rank), "--child", *own]
    environment = {**os.environ, "VENEER_CACHE": str(folder / "cache")}
    shutil.rmtree(folder / "cache" / "quantized", ignore_errors=True)  # the built kernels beside it stay
    began = time.perf_counter()
    if limit is None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    else:
        with memory_group(limit * MIB) as group:
            entering = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
            done = subprocess.run(entering, env=environment, capture_output=True, text=True, check=False)
    status = 128 - done.returncode if done.returncode < 0 else done.returncode
    figures = json.loads(done.stdout.splitlines()[-1]) if status == 0 else {}
    return {"status": status, "stderr": done.stderr, "seconds": time.perf_counter() - began, **figures}


def child(model: str, run: str, paged: str, *, steps: int, rank: int) -> None:
    """Train, and print the figures."""
    import torch

    from veneer.recipe.load import recipe_from
    from veneer.train.run import train_recipe

    torch.set_num_threads(1)
    seconds: list[float] = []
    pages = paged == "yes"
    recipe = recipe_from(
        {
            "model": model,
            "run": run,
            "data": {"train": str(Path(model).parent / "rows.jsonl")},
            "storage": "nf4",
            "method": {"name": "lora", "rank": rank},
            "optimizer": {"paged": pages, "in_backward": True},
            "memory": {"page_weights": pages, "page_activations": pages},
            "train": {
                "steps": steps, "tokens_per_step": 64, "micro_batch_tokens": 64, "max_length": 64,
                "dtype": "bfloat16", "recompute": True, "checkpoint_every": 0, "clip": 0,
            },
        }
    )  # fmt: skip
    outcome, _ = train_recipe(recipe, [lambda event: seconds.append(event.figures["seconds"])])
    with Path(outcome.adapter, "adapter_model.safetensors").open("rb") as file:
        adapter = hashlib.file_digest(file, "sha256").hexdigest()
    print(json.dumps({"step": statistics.median(seconds[1:]), "adapter": adapter, "peak": peak_rss_bytes()}))


if __name__ == "__main__":
    prepare_process()
    main()
