"""What runs on the CPU and on the fake device, and what comes out: `python cases.py FOLDER` prints a JSON line a case.

A line holds the largest relative difference between the two devices over the numbers that the case returns, or what
was raised on each. FOLDER holds `model` and `rows.jsonl`. test_fake_device.py runs it; the repository has to be on
PYTHONPATH.
"""

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.conftest import tiny_recipe
from tests.devices import fake_device

Case = Callable[[Path, str], Mapping[str, Tensor]]
CASES: dict[str, Case] = {}
LORA = {"name": "lora", "rank": 4}
RESTARTS = {"restarts": {"every": 2, "warmup": 0}, "train.steps": 5, "train.warmup": 0}
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {},
    "held_out": {"data.eval": "rows.jsonl", "data.eval_rows": 8, "train.eval_every": 2},
    "unpacked": {"data.packing": False, "train.micro_batch_tokens": 128},
    "bfloat16": {"train.dtype": "bfloat16"},
    "nf4": {"storage": "nf4"},
    "nf4_whole": {"storage": {"name": "nf4", "double_quant": False, "embeddings": True, "head": True}},
    "int8": {"storage": "int8"},
    "dora": {"method": {"name": "dora", "rank": 4}},
    "dora_nf4": {"method": {"name": "dora", "rank": 4}, "storage": "nf4"},
    "pissa": {"method": {"name": "pissa", "rank": 4}},
    "eva": {"method": {"name": "eva", "rank": 4, "look": 512}},
    "mora_sharing": {"method": {"name": "mora", "rank": 4, "variant": "sharing"}},
    "mora_rotation": {"method": {"name": "mora", "rank": 4, "variant": "rotation"}},
    "adalora": {"method": {"name": "adalora", "rank": 6, "target_rank": 3}, "train.steps": 4},
    "ia3": {"method": {"name": "ia3"}},
    "bottleneck": {"method": {"name": "bottleneck", "size": 4}},
    "full": {"method": {"name": "full", "targets": ["q_proj", "embed_tokens"]}},
    "rows_and_modules": {
        "method": {**LORA, "trained_modules": ["norm"]},
        "tokens": {"add": ["<a>"], "train": [5]},
    },
    "embedding": {"method": {**LORA, "targets": ["embed_tokens", "q_proj"]}},
    "prompt_and_lora": {"prompt": {"name": "prompt", "tokens": 4}},
    "prefix": {"method": {"name": "none"}, "prompt": {"name": "prefix", "tokens": 4}},
    "adamw8": {"optimizer.bits": 8},
    "lion": {"optimizer": {"name": "lion", "lr": 1e-3}},
    "sgd": {"optimizer": {"name": "sgd", "lr": 1e-2}},
    "adafactor": {"optimizer": {"name": "adafactor", "lr": 1e-2}},
    "in_backward": {"optimizer.in_backward": True, "train.micro_batch_tokens": 2048},
    "recompute": {"train.recompute": True},
    "page_activations": {"train.recompute": True, "memory.page_activations": True},
    "restarts": RESTARTS,
    "restarts_nf4": {**RESTARTS, "storage": "nf4"},
    "restarts_random": {
        **RESTARTS,
        "restarts": {"every": 2, "warmup": 0, "reset": "random"},
        "optimizer.bits": 8,
    },
    "remora": {**RESTARTS, "method": {"name": "mora", "rank": 4, "variant": "sharing"}},
    "page_weights": {"train.recompute": True, "memory.page_weights": True, "storage": "nf4"},
    "paged_state": {"optimizer.paged": True},
}


def case(run: Case) -> Case:
    CASES[run.__name__] = run
    return run


def recipe_of(folder: Path, device: str, run: str, changes: Mapping[str, Any]) -> Any:
    own = {"train.steps": 3, "method": LORA, "optimizer.paged": False, "device": device}
    here = {key: str(folder / value) if value == "rows.jsonl" else value for key, value in changes.items()}
    if "optimizer" in here:
        del own["optimizer.paged"]
    return tiny_recipe(folder / "model", folder / "rows.jsonl", folder / device / run, **{**own, **here})


def trained(folder: Path, device: str, run: str, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """The `Training`, and losses, norms and adapter of a run."""
    from veneer.train.run import train_recipe

    figures: dict[str, list[float]] = {"loss": [], "gradient_norm": []}

    def listen(event: Any) -> None:
        for name, numbers in figures.items():
            numbers += [event.figures[name]] if event.figures.get(name) is not None else []

    _, training = train_recipe(recipe_of(folder, device, run, changes), [listen])
    assert all(p.device.type == device for p in training.adapter.parameters())
    return training, {name: torch.tensor(numbers) for name, numbers in figures.items() if numbers} | {
        "logits": logits_of(training.base)
    }


def logits_of(base: Any) -> Tensor:
    with torch.no_grad():
        ids = torch.arange(3, 43, device=base.device.torch_device)[None]
        out: Tensor = base.network(input_ids=ids, use_cache=False).logits.float().cpu()
    return out


def training_case(name: str) -> Case:
    def run(folder: Path, device: str) -> Mapping[str, Tensor]:
        return trained(folder, device, name, **TRAINED[name])[1]

    return run


@case
def resumed(folder: Path, device: str) -> Mapping[str, Tensor]:
    """Zero if a run with dropout that was interrupted and resumed has the bytes of one that was not."""
    from veneer.train.run import train_recipe

    changes = {
        "method": {**LORA, "dropout": 0.3}, "train.recompute": True, "train.steps": 6, "train.checkpoint_every": 2
    }  # fmt: skip

    def stop(event: Any) -> None:
        if event.step == 5:
            raise OSError("the machine went down")

    whole, cut = (recipe_of(folder, device, run, changes) for run in ("whole", "cut"))
    train_recipe(whole)
    try:
        train_recipe(cut, [stop])
    except OSError:
        train_recipe(cut)
    files = [(folder / device / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")]
    return {"same bytes": torch.tensor(float(files[0] == files[1]))}


@case
def generation(folder: Path, device: str) -> Mapping[str, Tensor]:
    """Greedy and drawn text, in batches and in turns."""
    import veneer
    from veneer.generate.chat_session import ChatSession
    from veneer.generate.sampler import Sampling

    base = veneer.load_model(folder / "model", device=device, dtype="float32")
    prompts = [[3, 5, 8, 13], [3, 5, 9], [3, 5, 7, 70, 71, 72, 73]]
    found = {}
    for name, sampler in {
        "greedy": None,
        "drawn": Sampling(seed=1),
        "cut": Sampling(top_p=0.9, top_k=20, temperature=2.0),
        "nucleus": Sampling(top_p=0.5),
    }.items():
        given = {} if sampler is None else {"sampler": sampler}
        found |= {
            f"{name} {i}": torch.tensor(t)
            for i, t in enumerate(veneer.generate_tokens(base, prompts, max_new_tokens=12, **given))
        }
    talk = ChatSession(base, {}, max_new_tokens=6)
    found["talk"] = torch.tensor([len(talk.ask(text, lambda piece: None).text) for text in ("who", "which city")])
    return found


@case
def evaluation(folder: Path, device: str) -> Mapping[str, Tensor]:
    import veneer

    base = veneer.load_model(folder / "model", device=device, dtype="float32", storage="nf4")
    measured = veneer.evaluate(base, folder / "rows.jsonl", limit=8, max_new_tokens=6)
    return {name: torch.tensor(value) for name, value in measured.metrics.items()}


def merged_from(folder: Path, device: str, name: str, **changes: Any) -> Mapping[str, Tensor]:
    import veneer

    _, found = trained(folder, device, name, **changes)
    base = veneer.load_model(folder / "model", device=device, dtype="float32", storage=changes.get("storage"))
    adapter = veneer.load_adapter(base, folder / device / name / "adapter")
    again = logits_of(base)
    into = folder / device / f"{name}-merged"
    merged = adapter.merge(into, rows=4)
    whole = veneer.load_model(into, device=device, dtype="float32")
    assert whole.device.torch_device.type == device
    assert merged.drift.relative_drift < 1e-5
    return {"trained": found["logits"], "loaded": again, "merged": logits_of(whole)}


@case
def merging(folder: Path, device: str) -> Mapping[str, Tensor]:
    return merged_from(folder, device, "to_merge", method={**LORA, "targets": ["embed_tokens", "q_proj"]})


@case
def merging_nf4(folder: Path, device: str) -> Mapping[str, Tensor]:
    return merged_from(folder, device, "to_merge_nf4", method={"name": "dora", "rank": 4}, storage="nf4")


@case
def quantizing(folder: Path, device: str) -> Mapping[str, Tensor]:
    """Files of quantized weights, by the commands."""
    from safetensors.torch import load_file

    from veneer.cli.main import invoke

    found = {}
    for storage in ("nf4", "int8"):
        into = folder / device / f"quantized-{storage}"
        arguments = ["quantize", str(folder / "model"), "--to", str(into), "--storage", storage, "--device", device]
        assert invoke(arguments) == 0
        found |= {f"{storage} {name}": tensor for name, tensor in load_file(into / "model.safetensors").items()}
    return found


@case
def exporting(folder: Path, device: str) -> Mapping[str, Tensor]:
    """The nearest LoRA, and a GGUF file of it."""
    import veneer
    from veneer.merge.gguf_adapter import write_gguf_adapter

    training, _ = trained(folder, device, "to_export", method={"name": "mora", "rank": 4, "variant": "rotation"})
    made = veneer.as_lora(training.adapter, 8)
    write_gguf_adapter(made.adapter, folder / device / "adapter.gguf")
    made.adapter.save(folder / device / "exported")
    return {"errors": torch.tensor(list(made.errors.values()))}


@case
def commands(folder: Path, device: str) -> Mapping[str, Tensor]:
    """Every command that loads a model computes where `--device` says, and nowhere else."""
    from veneer.cli.main import invoke

    trained(folder, device, "by_command", **{"data.eval": "rows.jsonl"})
    model, run = str(folder / "model"), folder / device / "by_command"
    put = ["--adapter", str(run / "adapter")]
    verbs: list[list[str]] = [
        ["generate", model, *put, "--prompt", "which city", "--max-tokens", "4"],
        ["eval", str(run), "--rows", "2", "--max-tokens", "2"],
        ["merge", model, *put, "--into", str(folder / device / "command-merged"), "--rows", "2"],
        ["export", model, *put, "--to", "lora", "--into", str(folder / device / "command-lora")],
        ["chat", model, *put],
    ]
    found = {}
    for verb in verbs:
        before = fake_device.launches.total()
        with mock.patch.object(sys, "stdin", StringIO("who\n")):
            found[verb[0]] = torch.tensor(invoke([*verb, "--device", device]))
        assert (fake_device.launches.total() > before) == (device == fake_device.KIND), f"{verb[0]} computed elsewhere"
    assert not any(found.values()), found
    return found


CASES |= {name: training_case(name) for name in TRAINED}


def outcome(run: Case, folder: Path, device: str) -> tuple[Mapping[str, Tensor], str]:
    """Numbers and "", or nothing and what was raised."""
    try:
        with redirect_stdout(sys.stderr):
            return run(folder, device), ""
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/veneer/" in f.filename]
        where = f" ({frames[-1].filename.split('/veneer/')[-1]}:{frames[-1].lineno})" if frames else ""
        return {}, f"{type(error).__name__}: {error}{where}"


def refusals() -> dict[str, str]:
    """What the fake device says to operations that no GPU accepts."""
    x, y = torch.ones(3, device=fake_device.KIND), torch.ones(3)
    tried: dict[str, Callable[[], object]] = {
        "mixing": lambda: x + y,
        "generator": lambda: torch.rand(3, device=fake_device.KIND, generator=torch.Generator()),
        "float64": lambda: x.double(),
        "address": lambda: x.data_ptr(),
    }
    said = {}
    for name, call in tried.items():
        try:
            said[name] = f"accepted: {call()}"
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    return said


def far(on_cpu: Mapping[str, Tensor], on_fake: Mapping[str, Tensor]) -> float:
    """The largest difference of a tensor, against the size of the CPU's."""
    assert on_cpu.keys() == on_fake.keys()
    return max(
        (float((a.double() - on_fake[name].double()).norm() / a.double().norm().clamp_min(1e-9)))
        if a.shape == on_fake[name].shape
        else float("inf")
        for name, a in on_cpu.items()
    )


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    fake_device.install()
    print(json.dumps({"case": "refusals", "said": refusals()}))
    for name in names or CASES:
        on_cpu, cpu_error = outcome(CASES[name], folder, "cpu")
        on_fake, fake_error = outcome(CASES[name], folder, fake_device.KIND)
        difference = None if cpu_error or fake_error else far(on_cpu, on_fake)
        same = None if "same bytes" not in on_fake else float(on_fake["same bytes"])
        print(json.dumps({"case": name, "difference": difference, "cpu": cpu_error, "fake": fake_error, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
