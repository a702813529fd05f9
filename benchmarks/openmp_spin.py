"""How long should OpenMP's waiting threads spin?  A training step under several settings, with and without company.

    python benchmarks/openmp_spin.py [--rounds 15] [--spins default,passive,1000,10000]

One worker process per setting stays alive; the workers take turns, one step each, so that whatever else the machine
does meets all of them alike; the lowest time of each is the one least disturbed. A step is forward and backward of 8
LLaMA layers (hidden 576, bfloat16 where the machine is faster in it) over 512 tokens. "busy" adds one process that
computes without pause. Figures are seconds a step, medians unless they say lowest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORKER = """
import sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
dtype = getattr(torch, sys.argv[1])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=8,
                                     num_attention_heads=9, num_key_value_heads=3)).to(dtype)
ids = torch.randint(0, 4096, (2, 256))
def step():
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
step()
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    step()
    print(time.perf_counter() - began, flush=True)
"""
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def start_worker(spin: str, dtype: str) -> subprocess.Popen[str]:
    """A worker under one setting: "default" (nothing set), "passive", or a spin count."""
    own = {} if spin == "default" else {"OMP_WAIT_POLICY": "passive"} if spin == "passive" else {"GOMP_SPINCOUNT": spin}
    environment = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, "OMP_NUM_THREADS")} | own
    command = [sys.executable, "-c", WORKER, dtype]
    worker = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    return worker


def ask(worker: subprocess.Popen[str]) -> float:
    """Seconds of one step."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def measure(workers: dict[str, subprocess.Popen[str]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median and lowest seconds a step of each worker, taking turns; the order turns around every round."""
    times: dict[str, list[float]] = {spin: [] for spin in workers}
    for turn in range(rounds):
        for spin in list(workers)[:: 1 if turn % 2 else -1]:
            times[spin].append(ask(workers[spin]))
    median = {spin: round(statistics.median(seconds), 4) for spin, seconds in times.items()}
    return median, {spin: round(min(seconds), 4) for spin, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--spins", default="default,passive,300,1000,3000,10000,30000")
    options = parser.parse_args()
    from veneer import machine

    dtype = machine.probe_dtype().chosen
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    workers = {spin: start_worker(spin, dtype) for spin in options.spins.split(",")}
    try:
        quiet, quiet_lowest = measure(workers, options.rounds)
        busy_process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.5)
            busy, busy_lowest = measure(workers, options.rounds)
        finally:
            busy_process.kill()
    finally:
        for worker in workers.values():
            worker.kill()
    print(f"{'spin':>10} {'quiet s':>9} {'lowest':>9} {'busy s':>9} {'lowest':>9}")
    for spin in workers:
        row = (quiet[spin], quiet_lowest[spin], busy[spin], busy_lowest[spin])
        print(f"{spin:>10} " + " ".join(f"{seconds:>9.4f}" for seconds in row))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    figures = {"quiet_seconds": quiet, "quiet_lowest_seconds": quiet_lowest, "busy_seconds": busy}
    figures |= {"busy_lowest_seconds": busy_lowest, "load_average_before": load_before, "dtype": dtype}
    print(json.dumps({"machine": machine.describe().summary(), "commit": commit.stdout.strip(), **figures}))


if __name__ == "__main__":
    main()
