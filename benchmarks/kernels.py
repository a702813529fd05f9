"""Do 4-bit weights cost time?  Every kernel against bitsandbytes, dense torch and the machine's own ceiling.

    python benchmarks/kernels.py [--threads 2] [--rounds 9] [--quick] [--busy] [--isa avx2]

All that is compared takes turns in one run; a figure is the median of its rounds, a ratio that of the medians. Time is
the wall clock's for several threads and the thread's own for one. `--busy` runs a competing process on one core.
`--isa` forces an instruction set on ours and, for avx2, torch's AVX2 code on everything else. bitsandbytes then runs
what it runs without AVX-512: no product of its own, and its compiled scalar dequantization, which its library also
takes for rows of W that are no multiple of 16 long: it is told of rows of 8, the same numbers in the same order. Both
compute with bfloat16 rows; oneDNN may still serve theirs, as torch asks the machine and not the mask whether to use it.

What takes over 2 seconds a call, as their backward pass does without dot products, is called once, unwarmed; after it,
larger shapes are timed forward only, which is printed with the reason.

The last line is JSON. `quantize_vs_bitsandbytes`, `forward_backward_vs_bitsandbytes` and `decode_vs_bitsandbytes` say
how many times faster ours is, `time_vs_dense` how many times as long as dense bfloat16 it takes, and
`decode_share_of_read_bandwidth` is a share of 1: each the worst over the shapes.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = [(2048, 2048), (8192, 2048), (4096, 4096), (11008, 4096)]
"""O, D: from TinyLlama's attention to Llama-2 7B's feed-forward."""
TOKENS = 512
DISTINCT = 24
"""Matrices decoded in turn, more than any cache holds."""
SLOW = 2.0
"""Seconds: what takes longer is called once."""
Work = Callable[[], Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two shapes and three rounds")
    parser.add_argument("--busy", action="store_true", help="with a competing process on one core")
    parser.add_argument("--isa", help="force an instruction set: scalar, avx2, avx512 or avx512bf16")
    return parser.parse_args()


def medians(works: dict[str, Work], rounds: int, threads: int) -> dict[str, float]:
    """Seconds of each, taking turns; one turn each goes before, to warm up, and is all there is of what is SLOW."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    seen: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            if seen[name] and seen[name][0] > SLOW:
                continue
            start = clock()
            work()
            seen[name].append(clock() - start)
    return {name: statistics.median(values[1:] or values) for name, values in seen.items()}


def table(title: str, times: dict[str, float]) -> None:
    print(f"  {title:<28}" + "  ".join(f"{name} {1e3 * t:9.3f} ms" for name, t in times.items()), flush=True)


def scalar_dequantization() -> None:
    """Have bitsandbytes' library dequantize NF4 to bfloat16 in its scalar loop."""
    from bitsandbytes.backends.cpu import ops

    compiled = ops.lib.cdequantize_blockwise_cpu_nf4_bf16

    def in_rows_of_8(codes: Any, absmax: Any, out: Any, block: Any, rows: Any, columns: Any) -> None:
        numel = rows.value * columns.value
        compiled(codes, absmax, out, block, type(rows)(numel // 8), type(columns)(8))

    ops.lib.cdequantize_blockwise_cpu_nf4_bf16 = in_rows_of_8


class Bench:
    """The libraries under test, imported only when the environment is set."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes

        from veneer.kernels import native
        from veneer.storage.nf4 import NF4, NF4Config

        if options.isa == "avx2":
            scalar_dequantization()
        torch.set_num_threads(options.threads)
        self.torch, self.bnb, self.functional = torch, bitsandbytes, bitsandbytes.functional
        self.make, self.native = lambda w: NF4.of(w, NF4Config()), native.status()
        self.rounds, self.threads = (3 if options.quick else options.rounds), options.threads
        self.shapes = SHAPES[::2] if options.quick else SHAPES
        self.forced = options.isa
        torch.manual_seed(0)

    def weight(self, o: int, d: int) -> Any:
        return (self.torch.randn(o, d) * 0.02).bfloat16()

    def time(self, works: dict[str, Work], title: str, rounds: int | None = None) -> dict[str, float]:
        times = medians(works, rounds or self.rounds, self.threads)
        table(title, times)
        return times

    def theirs(self, w: Any) -> Any:
        """bitsandbytes' own layer, NF4 with double quantization, computing in bfloat16."""
        layer = self.bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=w.dtype, quant_type="nf4")
        layer.weight = self.bnb.nn.Params4bit(
            w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        if self.forced == "avx2":
            layer.support_avx512bf16_for_cpu = False  # or its eval kernel would use AVX-512 all the same
        return layer.to("cpu")

    def quantize(self) -> float:
        """bfloat16 -> NF4 with double quantization."""
        worst = float("inf")
        for o, d in self.shapes:
            w = self.weight(o, d)
            theirs = lambda w=w: self.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)  # noqa: E731
            works = {"ours": lambda w=w: self.make(w), "bitsandbytes": theirs}
            times = self.time(works, f"quantize {o} x {d}", min(self.rounds, 5))
            worst = min(worst, times["bitsandbytes"] / times["ours"])
        return worst

    def train(self) -> tuple[float, float]:
        """Forward and backward at 512 tokens: (times faster than bitsandbytes, times as long as dense)."""
        worst, longest, slow = float("inf"), 0.0, ""
        for o, d in self.shapes:
            w = self.weight(o, d)
            ours, theirs = self.make(w), self.theirs(w).train()
            x = self.torch.randn(TOKENS, d).bfloat16().requires_grad_()
            g = self.torch.randn(TOKENS, o).bfloat16()
            calls = {
                "ours": ours.matmul,
                "dense": lambda x, w=w: self.torch.nn.functional.linear(x, w),
                "bitsandbytes": theirs,
            }
            forward = {k: lambda f=f, x=x: f(x) for k, f in calls.items()}
            self.time(forward, f"forward {o} x {d}")
            if slow:
                print(f"  forward + backward {o} x {d}: not run, as {slow}", flush=True)
                continue
            both = {k: lambda f=f, x=x, g=g: self.torch.autograd.grad(f(x), x, g) for k, f in calls.items()}
            times = self.time(both, f"forward + backward {o} x {d}")
            worst = min(worst, times["bitsandbytes"] / times["ours"])
            longest = max(longest, times["ours"] / times["dense"])
            slow = "; ".join(f"{name} took {t:.1f} s at {o} x {d}" for name, t in times.items() if t > SLOW)
        return worst, longest

    def decode(self) -> tuple[float, float]:
        """One token through 24 distinct matrices: (share of the read bandwidth, times faster than bitsandbytes)."""
        torch, o, d = self.torch, 4096, 4096
        weights = [self.weight(o, d) for _ in range(DISTINCT)]
        ours = [self.make(w) for w in weights]
        theirs = [self.theirs(w).eval() for w in weights]
        del weights
        x, plain = torch.randn(1, d).bfloat16(), torch.ones(1 << 26, dtype=torch.int64)

        @torch.no_grad()
        def through(layers: list[Work]) -> None:
            for layer in layers:
                layer(x)

        works = {
            "ours": lambda: through([k.matmul for k in ours]),
            "bitsandbytes": lambda: through(theirs),
            "read 0.5 GiB": lambda: plain.sum(),
            "read the codes": lambda: [k.codes.view(torch.int64).sum() for k in ours],
        }
        times = self.time(works, f"decode {DISTINCT} of {o} x {d}", 2 * self.rounds)
        rate = sum(k.nbytes for k in ours) / times["ours"]
        ceiling = plain.nbytes / times["read 0.5 GiB"]
        same = sum(k.codes.nbytes for k in ours) / times["read the codes"]
        print(
            f"  {'':<28}ours reads {rate / 1e9:.1f} GB/s of {ceiling / 1e9:.1f}; torch the same codes {same / 1e9:.1f}"
        )
        return rate / ceiling, times["bitsandbytes"] / times["ours"]

    def few(self) -> None:
        """A few tokens at a time, for the table alone."""
        o, d = 4096, 4096
        w = self.weight(o, d)
        ours, theirs = self.make(w), self.theirs(w).eval()
        for n in (1, 4, 16, 64):
            x = self.torch.randn(n, d).bfloat16()
            dense = lambda x=x: self.torch.nn.functional.linear(x, w)  # noqa: E731
            with self.torch.no_grad():
                works = {"ours": lambda x=x: ours.matmul(x), "dense": dense, "bitsandbytes": lambda x=x: theirs(x)}
                self.time(works, f"{n} tokens {o} x {d}, cached", 2 * self.rounds)


def main() -> None:
    options = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    if options.isa:
        os.environ["VENEER_ISA"] = options.isa
        if options.isa == "avx2":
            os.environ |= {
                "ATEN_CPU_CAPABILITY": "avx2",
                "ONEDNN_MAX_CPU_ISA": "AVX2",
                "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            }
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    try:
        bench = Bench(options)
        print(f"veneer: {bench.native.isa}, {bench.native.reason}; {options.threads} threads, busy: {options.busy}")
        quantize = bench.quantize()
        train, dense = bench.train()
        share, decode = bench.decode()
        bench.few()
    finally:
        if rival is not None:
            rival.kill()
            rival.wait()
    from veneer import machine

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    figures = {
        "quantize_vs_bitsandbytes": round(quantize, 2),
        "forward_backward_vs_bitsandbytes": round(train, 3),
        "time_vs_dense": round(dense, 3),
        "decode_share_of_read_bandwidth": round(share, 3),
        "decode_vs_bitsandbytes": round(decode, 3),
    }
    setting = {"threads": options.threads, "busy": options.busy, "isa": bench.native.isa}
    print(json.dumps({"machine": machine.describe().summary(), "commit": commit.stdout.strip(), **setting, **figures}))


if __name__ == "__main__":
    main()
