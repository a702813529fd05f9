"""What does QLoRA of a 1.1B model take on this machine?  Memory and tokens a second, beside peft + bitsandbytes.

    python benchmarks/qlora_shape.py [--length 512] [--steps 4] [--rank 16] [--no-peer] [--one-setting recompute]

The shape is TinyLlama's (22 layers, hidden 2048, 32 heads on 4 of keys and values, feed-forward 5632, 32000 words),
with random weights, written once as bfloat16 safetensors to the cache of veneer (2.2 GB); `--layers` makes it less
deep. Each side trains a LoRA on all linear layers, one row of `--length` tokens a step, with and without recomputing
activations (gradient checkpointing), each in a process of its own that loads the folder as its users would. Here that
is `storage: nf4`, which quantizes while it streams in the first process and maps what it kept in the second; there it
is BitsAndBytesConfig (NF4, double quantization, bfloat16), device_map "cpu" and prepare_model_for_kbit_training.

`loading_seconds` begin with the imports and end before the first step; the first step is left out of the others.
`peak_bytes` is the largest resident memory of the whole process, `training_peak_bytes` that after the first step. A
side's process writes a line to stderr after its first step. The last line is JSON; ratios are ours to theirs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import closing_line

from veneer.machine import cache_dir, peak_rss_bytes, prepare_process, reset_peak_rss

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SETTINGS = {"plain": False, "recompute": True}
"""Name -> whether activations are recomputed."""


def main() -> None:
    args = arguments()
    if args.side:
        side = {"veneer": train_here, "peft": train_with_peft}[args.side]
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(side(args, Path(scratch))), flush=True)
        return
    folder = model_folder(args.layers)
    if not folder.exists():
        write_model(folder, args.layers)
    figures: dict[str, Any] = {name: getattr(args, name) for name in ("layers", "length", "steps", "rank", "threads")}
    print(f"{'':18} {'tokens/s':>9} {'s a step':>15} {'peak GB':>8} {'in training':>12} {'loading s':>10}")
    for setting in [args.one_setting] if args.one_setting else SETTINGS:
        for side in ["veneer", *(["peft"] if args.peer else [])]:
            found = in_process_of_its_own(args, side, setting)
            figures[f"{side}_{setting}"] = found
            steps = f"{min(found['step_seconds']):.2f}-{max(found['step_seconds']):.2f}"
            print(
                f"{side + ' ' + setting:18} {found['tokens_per_second']:9.1f} {steps:>15} "
                f"{found['peak_bytes'] / 1e9:8.2f} {found['training_peak_bytes'] / 1e9:12.2f} "
                f"{found['loading_seconds']:10.1f}",
                flush=True,
            )
        if args.peer:
            ours, theirs = figures[f"veneer_{setting}"], figures[f"peft_{setting}"]
            for name, key in (("memory", "peak_bytes"), ("speed", "tokens_per_second")):
                figures[f"{name}_vs_peft_{setting}"] = ours[key] / theirs[key]
    closing_line(figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, at most 2048")
    parser.add_argument("--steps", type=int, default=4, help="of each process, the first left out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one-setting", choices=list(SETTINGS), help="only this one of the two")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without peft + bitsandbytes")
    parser.add_argument("--side", choices=["veneer", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps is at least 2: the first is not measured")
    return args


def in_process_of_its_own(args: argparse.Namespace, side: str, setting: str) -> dict[str, Any]:
    """One side's figures; the peer gets torch's defaults for waiting threads, as its users would."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(args.threads)}
    if side == "peft":
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            environment.pop(name, None)
    given = [f"--{name}={getattr(args, name)}" for name in ("layers", "length", "steps", "rank", "threads")]
    command = [sys.executable, __file__, *given, "--side", side, "--one-setting", setting]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def model_folder(layers: int) -> Path:
    return cache_dir() / "benchmarks" / f"llama-1.1b-shape-{layers}-layers"


def write_model(folder: Path, layers: int) -> None:
    """Random weights, one tensor in memory at a time, and a tokenizer of one token a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from veneer.disk.atomic import replacing_folder
    from veneer.disk.tensors import writing_tensors

    print(f"writing {folder}", file=sys.stderr)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with replacing_folder(folder) as temporary:
        config.save_pretrained(temporary)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(temporary)
        specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        with writing_tensors(temporary / "model.safetensors", specs, {"format": "pt"}) as writer:
            for name, shape in shapes.items():
                drawn = torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.ones(shape)
                writer.write(name, drawn.to(torch.bfloat16))


def texts(args: argparse.Namespace) -> list[str]:
    """One row a step: as many letters as give `length` tokens with the end of text."""
    import random

    drawn = random.Random(0)
    return ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=args.length - 1)) for _ in range(args.steps)]


def train_here(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    began, before = time.perf_counter(), 0
    from veneer.recipe.load import recipe_from
    from veneer.train.events import Event
    from veneer.train.run import train_recipe

    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(args)), encoding="utf-8")
    settings = {"steps": args.steps, "tokens_per_step": args.length, "max_length": args.length, "checkpoint_every": 0}
    recipe = recipe_from(
        {
            "model": str(model_folder(args.layers)),
            "storage": {"name": "nf4", "double_quant": True},
            "method": {"name": "lora", "rank": args.rank, "alpha": 2 * args.rank},
            "data": {"train": str(rows), "text": "{text}"},
            "optimizer": {"lr": 2e-4},
            "train": settings | {"dtype": "bfloat16", "recompute": SETTINGS[args.one_setting]},
            "run": str(scratch / "run"),
        }
    )
    steps: list[dict[str, Any]] = []
    loading: list[float] = []

    def listen(event: Event) -> None:
        nonlocal before
        if not steps:
            loading.append(time.perf_counter() - began - event.figures["seconds"])
            before = peak_rss_bytes()
            reset_peak_rss()
            loaded()
        steps.append(event.figures)

    train_recipe(recipe, [listen], lambda text: print(text, file=sys.stderr))
    return summed(args, [step["seconds"] for step in steps], [step["loss"] for step in steps], loading[0], before)


def train_with_peft(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """As the documentation of peft and transformers shows QLoRA."""
    began = time.perf_counter()
    sys.path.remove(str(Path(__file__).parent))  # bitsandbytes asks for a package that is named as a file here
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = model_folder(args.layers)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=SETTINGS[args.one_setting])
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    rows = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts(args)]
    assert all(len(row) == args.length for row in rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    model.train()
    seconds: list[float] = []
    losses: list[float] = []
    loading, before = time.perf_counter() - began, 0
    for row in rows:
        started = time.perf_counter()
        loss = model(input_ids=row[None], labels=row[None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not seconds:
            before = peak_rss_bytes()
            reset_peak_rss()
            loaded()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return summed(args, seconds, losses, loading, before)


def loaded() -> None:
    print(f"process {os.getpid()} has loaded and made its first step", file=sys.stderr, flush=True)


def summed(
    args: argparse.Namespace, seconds: list[float], losses: list[float], loading: float, before: int
) -> dict[str, Any]:
    """A process's figures, at its end; `before` is its peak up to the end of the first step."""
    training = peak_rss_bytes()
    return {
        "tokens_per_second": args.length / statistics.median(seconds[1:]),
        "step_seconds": seconds[1:],
        "first_step_seconds": seconds[0],
        "peak_bytes": max(before, training),
        "training_peak_bytes": training,
        "loading_seconds": loading,
        "losses": losses,
    }


if __name__ == "__main__":
    prepare_process()
    main()
