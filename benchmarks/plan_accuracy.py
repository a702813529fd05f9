"""How near does `veneer plan` come?  Its peak of memory and its seconds a step beside the measured ones.

    python benchmarks/plan_accuracy.py [--only NAME ...] [--held-out] [--small] [--steps 3] [--threads 1]

Every recipe is trained for a few steps in a process of its own, as `veneer train` does: memory is foreseen where
`train` checks it, with what the process holds then, and `peak` is the largest resident set of the process until its
end. The seconds are foreseen in another process, from blocks that are timed anew there; beside them stands the mean of
the steps after the first. The models are SmolLM2-135M-Instruct, LLaMA shapes of 0.4B, 0.7B and 1.1B (6, 12 and 22
layers of TinyLlama's, random weights, written once to veneer's cache as benchmarks/qlora_shape.py does), and one of
0.37B with 24 narrow layers. Quantized bases are made before they are measured, so what is measured is a start from the
cache. Rows are text of a given number of tokens, or of varied ones. Paged optimizer state and the mapped files of paged
weights are counted as resident on both sides: there is room for them.

What memory the heap leaves unused is a fitted rule (plan/memory.py), fitted to `FITTED`. The recipes of `HELD_OUT` have
lengths, shapes, methods and combinations that no constant was chosen for: they were written down when the rule stood,
and measured afterwards. Seconds have no fitted constants.

`error` is plan over measured, minus 1; the aims are 0.07 in the median and 0.12 at worst for memory, 0.25 at worst for
time. The last line is JSON. `--small` takes two recipes of SmolLM2 with few tokens.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
from qlora_shape import model_folder, write_model
from report import closing_line

from veneer.machine import cache_dir, peak_rss_bytes, prepare_process

MIB = 2**20
SMOL = "smollm2-135m-instruct"
NARROW = "narrow"
"""A LLaMA shape of 0.37B."""
AIM_MEDIAN, AIM_WORST, AIM_TIME = 0.07, 0.12, 0.25

AGAIN = {"train.recompute": True}
NF4 = {"storage.name": "nf4", "storage.double_quant": True}
PAGED = {**NF4, **AGAIN, "memory.page_weights": True}
Case = tuple[str | int, int | None, dict[str, Any]]
"""Model (a number is layers of the made shape), tokens of each row (None: varied), changes of the defaults."""
FITTED: dict[str, Case] = {
    "smollm2": (SMOL, None, {}),
    "smollm2-1x1024": (SMOL, 1024, {}),
    "smollm2-4x512": (SMOL, 512, {}),
    "smollm2-1x512": (SMOL, 512, {"train.tokens_per_step": 512, "data.packing": False}),
    "smollm2-recompute": (SMOL, 1024, AGAIN),
    "smollm2-half": (SMOL, 1024, {"train.recompute": 15}),
    "smollm2-dora": (SMOL, 512, {"method.name": "dora", "train.tokens_per_step": 1024}),
    "smollm2-mora": (SMOL, 512, {"method.name": "mora", "train.tokens_per_step": 1024}),
    "smollm2-nf4": (SMOL, 512, NF4),
    "smollm2-int8": (SMOL, 512, {"storage.name": "int8", "train.tokens_per_step": 1024}),
    "smollm2-float32": (SMOL, 512, {"train.dtype": "float32", "train.tokens_per_step": 512}),
    "smollm2-rank256-8bit": (SMOL, 256, {"method.rank": 256, "optimizer.bits": 8, "train.tokens_per_step": 256}),
    "smollm2-rank256-paged": (SMOL, 256, {"method.rank": 256, "optimizer.paged": True, "train.tokens_per_step": 256}),
    "0.4b": (6, 512, {"train.tokens_per_step": 512}),
    "0.4b-nf4": (6, 1024, {**NF4, "train.tokens_per_step": 1024}),
    "0.4b-nf4-recompute": (6, 1024, {**NF4, **AGAIN, "train.tokens_per_step": 1024}),
    "0.4b-fp4-rank128-8bit": (
        6,
        256,
        {"storage.name": "fp4", "method.rank": 128, "optimizer.bits": 8, "train.tokens_per_step": 256},
    ),
    "0.4b-paged": (
        6,
        1024,
        {**NF4, **AGAIN, "memory.page_weights": True, "memory.page_activations": True, "train.tokens_per_step": 1024},
    ),
    "1.1b-nf4": (22, 256, {**NF4, "train.tokens_per_step": 256}),
    "1.1b-nf4-recompute": (22, 512, {**NF4, **AGAIN, "train.tokens_per_step": 512}),
    "smollm2-ia3": (SMOL, 300, {"method.name": "ia3", "train.tokens_per_step": 1200}),
    "smollm2-dora-recompute": (SMOL, 900, {**AGAIN, "method.name": "dora", "train.tokens_per_step": 1800}),
    "0.37b-nf4-recompute": (NARROW, 1400, {**NF4, **AGAIN, "train.tokens_per_step": 1400, "train.max_length": 1400}),
    "smollm2-2x768": (SMOL, 768, {"train.tokens_per_step": 1536}),
    "smollm2-varied-nf4": (SMOL, None, {**NF4, "train.tokens_per_step": 3000}),
    "smollm2-varied-unpacked": (SMOL, None, {"data.packing": False, "train.tokens_per_step": 1500}),
    "smollm2-prefix": (SMOL, 640, {"prompt.name": "prefix", "method.name": "none", "train.tokens_per_step": 1280}),
    "smollm2-adalora-int8": (
        SMOL,
        400,
        {"storage.name": "int8", "method.name": "adalora", "train.tokens_per_step": 800},
    ),
    "smollm2-mora-recompute": (SMOL, 600, {**AGAIN, "method.name": "mora", "train.tokens_per_step": 1800}),
    "0.37b-fp4-recompute": (NARROW, 900, {**AGAIN, "storage.name": "fp4", "train.tokens_per_step": 900}),
    "0.37b": (NARROW, 700, {"train.tokens_per_step": 700}),
    "0.7b-nf4-half": (12, 640, {**NF4, "train.recompute": 6, "train.tokens_per_step": 640}),
    "0.7b-fp4-recompute": (12, 320, {**AGAIN, "storage.name": "fp4", "train.tokens_per_step": 960}),
    "1.1b-int8-recompute": (22, 384, {**AGAIN, "storage.name": "int8", "train.tokens_per_step": 384}),
    "1.1b-paged": (22, 640, {**PAGED, "train.tokens_per_step": 640}),
}
HELD_OUT: dict[str, Case] = {
    "smollm2-6x320-fp4": (SMOL, 320, {"storage.name": "fp4", "train.tokens_per_step": 1920}),
    "smollm2-pissa-varied": (SMOL, None, {"method.init": "pissa", "train.tokens_per_step": 2500}),
    "smollm2-dora-nf4-recompute": (SMOL, 700, {**NF4, **AGAIN, "method.name": "dora", "train.tokens_per_step": 1400}),
    "0.37b-recompute": (NARROW, 1200, {**AGAIN, "train.tokens_per_step": 1200, "train.max_length": 1200}),
    "0.4b-mora": (6, 768, {"method.name": "mora", "train.tokens_per_step": 768}),
    "0.7b-int8-half": (12, 448, {"storage.name": "int8", "train.recompute": 6, "train.tokens_per_step": 896}),
    "1.1b-nf4-recompute-2x450": (22, 450, {**NF4, **AGAIN, "train.tokens_per_step": 900}),
}
RECIPES = FITTED | HELD_OUT
SMALL: dict[str, Case] = {
    "small": (SMOL, 128, {"train.tokens_per_step": 256}),
    "small-recompute": (SMOL, 128, {**AGAIN, "train.tokens_per_step": 256}),
}


def main() -> None:
    args = arguments()
    if args.child:
        job = json.loads(args.child)
        print(json.dumps((foresee_seconds if job["seconds"] else child)(job, args.steps)), flush=True)
        return
    known = {**RECIPES, **SMALL}
    chosen = args.only or list(SMALL if args.small else HELD_OUT if args.held_out else RECIPES)
    print(
        f"{'recipe':26}{'plan MiB':>10}{'measured':>10}{'error':>9}{'plan s':>10}{'measured':>10}{'error':>9}",
        flush=True,
    )
    found = {}
    for name in chosen:
        model, length, changes = known[name]
        f = found[name] = measured(prepared(model), length, changes, args) | {"held_out": name in HELD_OUT}
        f["error"] = f["plan_bytes"] / f["peak_bytes"] - 1
        f["time_error"] = f["plan_seconds_a_step"] / f["seconds_a_step"] - 1
        plan, peak = (f[key] / MIB for key in ("plan_bytes", "peak_bytes"))
        print(f"{name:26}{plan:10.0f}{peak:10.0f}{f['error']:9.1%}", end="")
        print(f"{f['plan_seconds_a_step']:10.2f}{f['seconds_a_step']:10.2f}{f['time_error']:9.1%}", flush=True)
    figures: dict[str, Any] = {"recipes": found, "threads": args.threads}
    for group, members in {"": found, "held_out_": {n: f for n, f in found.items() if f["held_out"]}}.items():
        for key, aims in {"error": f"{AIM_MEDIAN:.0%} and {AIM_WORST:.0%}", "time_error": f"{AIM_TIME:.0%}"}.items():
            errors = [abs(f[key]) for f in members.values()]
            if errors:
                median, worst = statistics.median(errors), max(errors)
                figures |= {f"{group}median_{key}": median, f"{group}worst_{key}": worst}
                print(f"{group}{key}: median {median:.1%}, worst {worst:.1%} (aim {aims}), {len(errors)} recipes")
    closing_line(figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, *SMALL], metavar="NAME")
    parser.add_argument("--held-out", action="store_true", help="only the recipes that nothing was fitted to")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="at least 2: the first is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepared(model: str | int) -> str:
    """The model's name or folder, which is written if it is missing."""
    if model == NARROW:
        folder = cache_dir() / "benchmarks" / "llama-0.37b-shape"
        if not folder.exists():
            synthetic.write_model(folder, synthetic.Shape(24, 1024, 2816, 16), quantized=False)
        return str(folder)
    if isinstance(model, str):
        return model
    folder = model_folder(model)
    if not folder.exists():
        write_model(folder, model)
    return str(folder)


def measured(model: str, length: int | None, changes: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Plan and measurement of one recipe; the base is quantized by a process of its own before, if that is to do."""
    with tempfile.TemporaryDirectory(prefix="veneer-plan-") as scratch:
        folder = Path(scratch)
        tree: dict[str, Any] = {
            "model": model,
            "data": {"train": str(folder / "rows.jsonl"), "text": "{text}"},
            "train": {"steps": args.steps, "checkpoint_every": 0},
        }
        for dotted, value in changes.items():
            section, key = dotted.split(".")
            tree.setdefault(section, {})[key] = value
        job, found = {"tree": tree, "length": length}, {"to_quantize": True}
        for turn in range(2 if "storage" in tree else 1):
            tree["run"] = str(folder / f"run-{turn}")
            if found["to_quantize"]:
                found = in_a_process({**job, "seconds": False}, args)
        return found | in_a_process({**job, "seconds": True}, args)


def in_a_process(job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--steps", str(args.steps), "--child", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job['tree']} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(job: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train; what was foreseen before the weights were read, and what it took."""
    from veneer.plan.memory import estimate
    from veneer.recipe.load import recipe_from
    from veneer.train.events import Event
    from veneer.train.job import read_job
    from veneer.train.preflight import preflight
    from veneer.train.run import open_run
    from veneer.train.setup import set_up

    tree = job["tree"]
    write_rows(Path(tree["data"]["train"]), tree["model"], job["length"], rows=16 * steps)
    held: list[int] = []
    seconds: list[float] = []

    def listen(event: Event) -> None:
        held.append(event.figures["rss_bytes"])
        seconds.append(event.figures["seconds"])

    with open_run(recipe_from(tree)) as session:
        checked = preflight(read_job(session.recipe))
        foreseen = estimate(checked)
        session.train(set_up(checked), [listen])
    return {
        "plan_bytes": foreseen.peak_bytes + foreseen.droppable_bytes,
        "peak_bytes": peak_rss_bytes(),
        "parts": foreseen.parts,
        "moment": foreseen.moment,
        "to_quantize": "quantized base in the cache" in foreseen.disk,
        "held_after_steps": held,
        "step_seconds": seconds,
        "seconds_a_step": sum(seconds[1:]) / len(seconds[1:]),
    }


def foresee_seconds(job: dict[str, Any], steps: int) -> dict[str, Any]:
    """What is foreseen for the steps after the first, every block timed anew."""
    import veneer.plan.time as timing
    from veneer.plan.memory import estimate
    from veneer.recipe.load import recipe_from
    from veneer.train.job import read_job, with_dtype
    from veneer.train.preflight import preflight

    timing.cached = lambda facts, measure: measure()
    tree = job["tree"]
    write_rows(Path(tree["data"]["train"]), tree["model"], job["length"], rows=16 * steps)
    checked = preflight(read_job(with_dtype(recipe_from(tree))))
    found = estimate(checked)
    began = time.perf_counter()
    times = timing.times(checked, found)
    took = time.perf_counter() - began
    return {"plan_seconds_a_step": sum(times.steps[1:]) / len(times.steps[1:]), "timing_seconds": took}


def write_rows(file: Path, model: str, length: int | None, rows: int) -> None:
    """Texts of random small letters and blanks, cut to `length` tokens with the one that ends a text."""
    from veneer.models.skeleton import load_tokenizer
    from veneer.models.sources import resolve

    tokenizer, drawn = load_tokenizer(resolve(model)), random.Random(0)
    if "w3" in tokenizer.get_vocab():  # a word a token
        assert length is not None
        synthetic.write_rows(file, rows, length, len(tokenizer))
        return
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            wanted = length or drawn.choice((64, 128, 192, 256, 384, 512, 768, 1000))
            letters = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz ", k=8 * wanted))
            words = tokenizer(letters, add_special_tokens=False)["input_ids"][: wanted - 1]
            while len(tokenizer(text := tokenizer.decode(words), add_special_tokens=False)["input_ids"]) >= wanted:
                words = words[:-1]
            out.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    prepare_process()
    main()
