"""Does this checkout train the same adapters as another revision, byte for byte?

    python benchmarks/same_bytes.py --against REV [--only NAME ...] [--checkout DIR]

Trains a tiny random Llama by every recipe below, once with this checkout and once with a temporary git worktree of REV,
each time with `python -m veneer train` in a process of its own, and compares the sha256 of every .safetensors file in
the adapter folder. Prints a line per recipe: same, DIFFERS with both hashes, or failed with the last line of stderr.
Exit status 1 unless all are the same. Each side has its own cache, so it also quantizes and compiles for itself.

The recipes keep the names of the first version: a newer one has to accept them.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

INTERRUPT_AFTER = 3
"""Events of the interrupted recipe before it gets SIGINT."""

COMMON = """
data: {train: ../rows.jsonl}
model: ../model
optimizer: {lr: 0.01}
train: {steps: 4, tokens_per_step: 256, micro_batch_tokens: 128, max_length: 128, dtype: float32}
"""

RECIPES = {
    "lora": "method: {name: lora, rank: 4, rank_stabilized: true}",
    "dropout": "method: {name: lora, rank: 4, dropout: 0.3}",
    "dora": "method: {name: dora, rank: 4}",
    "pissa": "method: {name: pissa, rank: 4}",
    "eva": "method: {name: eva, rank: 4, look: 512}",
    "mora-sharing": "method: {name: mora, rank: 4, variant: sharing}",
    "mora-rotation": "method: {name: mora, rank: 4, variant: rotation}",
    "adalora": "method: {name: adalora, rank: 6, target_rank: 3}",
    "ia3": "method: ia3",
    "bitfit": "method: {name: bitfit, targets: [q_proj, o_proj]}",
    "bottleneck": "method: {name: bottleneck, size: 4, targets: [o_proj, down_proj]}",
    "full": "method: {name: full, targets: [q_proj, embed_tokens]}",
    "prompt": "prompt: {name: prompt, tokens: 5}",
    "prefix-and-lora": "{method: {name: lora, rank: 4}, prompt: {name: prefix, tokens: 5}}",
    "nf4-adamw8": "{storage: {name: nf4, double_quant: true}, optimizer: {bits: 8}, method: {name: lora, rank: 64}}",
    "int8": "{storage: int8, method: {name: lora, rank: 4}}",
    "relora-weight": """
        method: {name: lora, rank: 4}
        restarts: {every: 2, reset: magnitude, keep: 0.3, fold: weight}
        train: {steps: 6}
    """,
    "relora-beside": """
        method: {name: lora, rank: 4}
        restarts: {every: 2, reset: random, fold: beside}
        train: {steps: 6}
    """,
    "remora": "{method: {name: mora, rank: 4, variant: sharing}, restarts: {every: 2}, train: {steps: 6}}",
    "page-activations": """
        method: {name: lora, rank: 4}
        train: {recompute: true}
        memory: {page_activations: true}
    """,
    "in-backward": """
        method: {name: lora, rank: 4, dropout: 0.1}
        optimizer: {in_backward: true}
        train: {tokens_per_step: 64}
    """,
    "interrupted": "{method: {name: lora, rank: 4, dropout: 0.1}, train: {steps: 100}}",
}


CORPUS = "which city has the largest number of customers after the quick brown fox jumps over a lazy dog"


class Failed(Exception):
    """A recipe did not train; the message is the last line of stderr that is not indented."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", required=True, help="the revision to compare with")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=RECIPES, help="these recipes alone")
    parser.add_argument("--checkout", metavar="DIR", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args()
    checkout = args.checkout.absolute()
    sys.path[:0] = [str(checkout / "src"), str(checkout / "benchmarks")]
    from report import closing_line

    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary, worktree(checkout, args.against, Path(temporary)) as other:
        sides = [(root, Path(temporary) / name) for name, root in (("here", checkout), ("there", other))]
        for _, folder in sides:
            folder.mkdir()
        make_inputs(checkout, Path(temporary))
        for recipe in args.only or RECIPES:
            found[recipe] = compared(recipe, sides)
            print(f"{recipe:18}{found[recipe]}", flush=True)
    same = sum(verdict == "same" for verdict in found.values())
    closing_line({"against": args.against, "same": same, "recipes": found})
    return 0 if same == len(found) else 1


@contextmanager
def worktree(checkout: Path, revision: str, temporary: Path) -> Iterator[Path]:
    """A checkout of the revision, removed at the end."""
    folder = temporary / "worktree"
    git = ["git", "-C", str(checkout), "worktree"]
    done = subprocess.run([*git, "add", "--detach", str(folder), revision], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"git made no worktree of {revision}: {last_line(done.stderr)}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True, check=False)


def make_inputs(checkout: Path, folder: Path) -> None:
    """Write the model and the rows that both sides train on."""
    make = "import sys; from pathlib import Path; from tests.conftest import make_model as make\n"
    make += "make(Path(sys.argv[1]), attention_bias=True)"
    command = [sys.executable, "-c", make, str(folder / "model")]
    done = subprocess.run(
        command, cwd=checkout, env=environment(checkout, folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the model was not made: {last_line(done.stderr)}")
    words = CORPUS.split()
    rows = [{"prompt": " ".join(words[i % 7 : i % 7 + 2 + i % 9]), "completion": words[i % 18]} for i in range(36)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def compared(name: str, sides: list[tuple[Path, Path]]) -> str:
    """Train on both sides at once: "same", or what differs, or why one failed."""
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(trained, name, *side) for side in sides]
    errors = zip(("here", "there"), (job.exception() for job in jobs), strict=True)
    failed = [f"{place}: {error}" for place, error in errors if error]
    if failed:
        return f"failed {'; '.join(failed)}"
    here, there = (job.result() for job in jobs)
    differing = [path for path in sorted({*here, *there}) if here.get(path) != there.get(path)]
    told = [f"{path} {here.get(path, 'absent')} here, {there.get(path, 'absent')} there" for path in differing]
    return f"DIFFERS {'; '.join(told)}" if told else "same"


def trained(name: str, root: Path, folder: Path) -> dict[str, str]:
    """Train one recipe with the checkout `root` inside `folder`: path -> sha256 of each file of tensors."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(recipe_text(name), encoding="utf-8")
    if name == "interrupted":
        interrupt(recipe, root, folder / name / "events.jsonl")
    with start(recipe, root) as process:
        _, said = process.communicate()
    if process.returncode:
        raise Failed(last_line(said))
    adapter = folder / name / "adapter"
    hashes = {str(p.relative_to(adapter)): sha256(p) for p in adapter.rglob("*.safetensors")}
    if not hashes:
        raise Failed(f"training wrote no .safetensors file into {adapter}")
    return hashes


def recipe_text(name: str) -> str:
    """The recipe as YAML: its own keys outrank the common ones."""
    tree: dict[str, Any] = {"run": name, **yaml.safe_load(COMMON)}
    for section, value in yaml.safe_load(RECIPES[name]).items():
        tree[section] = {**tree[section], **value} if section in tree else value
    return yaml.safe_dump(tree)


def interrupt(recipe: Path, root: Path, events: Path) -> None:
    """Start the recipe and send SIGINT after some events."""
    with start(recipe, root) as process:
        while process.poll() is None and not (
            events.exists() and len(events.read_bytes().splitlines()) >= INTERRUPT_AFTER
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    if process.returncode == 0:
        raise Failed("it ended before it could be interrupted")
    if not events.exists():
        raise Failed(last_line(said))


def start(recipe: Path, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "veneer", "train", recipe.name]
    surroundings = environment(root, recipe.parent)
    return subprocess.Popen(
        command, cwd=recipe.parent, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def environment(root: Path, folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(root / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VENEER_CACHE": str(folder / "cache"),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_line(text: str) -> str:
    """The last line that is not indented: a message's first, a traceback's last."""
    return next((line for line in reversed(text.splitlines()) if line and line[0] != " "), "it said nothing")


if __name__ == "__main__":
    sys.exit(main())
