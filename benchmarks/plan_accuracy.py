"""How near does `veneer plan` come?  Its peak of memory beside the measured one, over recipes of all kinds.

    python benchmarks/plan_accuracy.py [--only NAME ...] [--small] [--steps 2] [--threads 1]

Every recipe is trained for a few steps in a process of its own, as `veneer train` does: the plan is made where `train`
checks it, with what the process holds then, and `peak` is the largest resident set of the process until its end. The
models are SmolLM2-135M-Instruct and LLaMA shapes of 0.4B and 1.1B (6 and 22 layers of TinyLlama's, random weights,
written once to veneer's cache as benchmarks/qlora_shape.py does). Quantized bases are made before they are measured,
so what is measured is a start from the cache. Rows are text of a given number of tokens, or of varied ones. Paged
optimizer state is counted as resident on both sides: there is room for it.

`error` is plan over measured, minus 1; the aims are 0.07 in the median and 0.12 at worst. The last line is JSON.
`--small` takes two recipes of SmolLM2 with few tokens.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_shape import model_folder, write_model
from report import closing_line

from veneer.machine import peak_rss_bytes, prepare_process

MIB = 2**20
SMOL = "smollm2-135m-instruct"
AIM_MEDIAN, AIM_WORST = 0.07, 0.12

AGAIN = {"train.recompute": True}
NF4 = {"storage.name": "nf4", "storage.double_quant": True}
RECIPES: dict[str, tuple[str | int, int | None, dict[str, Any]]] = {
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
}
"""Name -> model (a number is layers of the made shape), tokens of each row (None: varied), changes of the defaults."""
SMALL = {
    "small": (SMOL, 128, {"train.tokens_per_step": 256}),
    "small-recompute": (SMOL, 128, {**AGAIN, "train.tokens_per_step": 256}),
}


def main() -> None:
    args = arguments()
    if args.child:
        print(json.dumps(child(json.loads(args.child), args.steps)), flush=True)
        return
    known = {**RECIPES, **SMALL}
    chosen = args.only or list(SMALL if args.small else RECIPES)
    print(f"{'recipe':24}{'plan MiB':>10}{'measured':>10}{'error':>9}", flush=True)
    found = {}
    for name in chosen:
        model, length, changes = known[name]
        found[name] = measured(name, prepared(model), length, changes, args)
        error = found[name]["error"] = found[name]["plan_bytes"] / found[name]["peak_bytes"] - 1
        plan, peak = (found[name][key] / MIB for key in ("plan_bytes", "peak_bytes"))
        print(f"{name:24}{plan:10.0f}{peak:10.0f}{error:9.1%}", flush=True)
    errors = [abs(f["error"]) for f in found.values()]
    median, worst = statistics.median(errors), max(errors)
    print(f"error: median {median:.1%} (aim {AIM_MEDIAN:.0%}), worst {worst:.1%} (aim {AIM_WORST:.0%})")
    closing_line({"recipes": found, "median_error": median, "worst_error": worst, "threads": args.threads})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, *SMALL], metavar="NAME")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepared(model: str | int) -> str:
    """The model's name or folder, which is written if it is missing."""
    if isinstance(model, str):
        return model
    folder = model_folder(model)
    if not folder.exists():
        write_model(folder, model)
    return str(folder)


def measured(
    name: str, model: str, length: int | None, changes: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Plan and peak of one recipe; the base is quantized by a process of its own before, if that is still to do."""
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
        for turn in range(2 if "storage" in tree else 1):
            tree["run"] = str(folder / f"run-{turn}")
            found = in_a_process({"tree": tree, "length": length}, args)
            if not found["to_quantize"]:
                break
    return found


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
    from veneer.train.events import Event
    from veneer.train.loop import train
    from veneer.train.prepare import Plan, Rows
    from veneer.train.recipe import recipe_from
    from veneer.train.settings import Recipe

    tree = job["tree"]
    write_rows(Path(tree["data"]["train"]), tree["model"], job["length"], rows=16 * steps)
    foreseen: list[Any] = []
    held: list[int] = []

    def check(recipe: Recipe, rows: Rows, order: Plan) -> None:
        foreseen.append(estimate(recipe, rows, order))

    def listen(event: Event) -> None:
        held.append(event.figures["rss_bytes"])

    outcome, _ = train(recipe_from(tree), [listen], lambda text: print(text, file=sys.stderr), check)
    return {
        "plan_bytes": foreseen[0].peak_bytes + foreseen[0].droppable_bytes,
        "peak_bytes": peak_rss_bytes(),
        "parts": foreseen[0].parts,
        "moment": foreseen[0].moment,
        "to_quantize": "quantized base in the cache" in foreseen[0].disk,
        "held_after_steps": held,
        "step_seconds": outcome.seconds / outcome.steps,
    }


def write_rows(file: Path, model: str, length: int | None, rows: int) -> None:
    """Texts of random small letters and blanks, cut to `length` tokens with the one that ends a text."""
    from veneer.models.load import load_tokenizer

    tokenizer, drawn = load_tokenizer(model), random.Random(0)
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
