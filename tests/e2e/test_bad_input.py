"""All that can be wrong, as its user meets it: one message that says where and what to do, and nothing is harmed."""

import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import copy_headers
from tests.e2e.conftest import recipe_text
from veneer.cli.main import invoke
from veneer.disk.tensors import TensorWriter

Refused = Callable[..., None]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def refused(home: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line and hold it to: exit status, all words in one message, stdout empty, earlier files whole.

    A run that was refused may have left its recipe, and nothing else.  `denied` is a file that may not be opened.
    """

    def check(command: str, *words: str, status: int = 2, denied: Path | None = None) -> None:
        shutil.rmtree(home / "run", ignore_errors=True)
        before, model = files_of(home), files_of(tiny_model)
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(io, "open", refusing(denied))
            assert invoke(command.split()) == status
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        message = captured.err[captured.err.rindex("veneer: ") :] if "veneer: " in captured.err else captured.err
        for word in words:
            assert word in message, f"{word!r} is not in: {message}"
        after = files_of(home)
        assert {name: after.get(name) for name in before} == before, "an earlier file was changed"
        assert after.keys() - before.keys() <= {"run/recipe.yaml"}, "something was left"
        assert files_of(tiny_model) == model

    return check


def refusing(denied: Path | None) -> Callable[..., Any]:
    """`open` for a user who may not read one file; root may read all, whatever its mode."""
    opened = io.open

    def open_(file: Any, *more: Any, **named: Any) -> Any:
        if denied is not None and not isinstance(file, int) and Path(file) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *more, **named)

    return open_


def test_a_recipe_that_is_not_there(refused: Refused, home: Path) -> None:
    refused("train recpie.yaml", "there is no recipe recpie.yaml. Did you mean 'recipe.yaml'?", str(home), "YAML file")


def test_a_recipe_that_is_no_recipe(refused: Refused, home: Path) -> None:
    (home / "empty.yaml").write_text("")
    refused("train empty.yaml", "empty.yaml: a recipe is a YAML mapping (model: ..., data: ...,", "but this is empty")
    (home / "cut.yaml").write_text("model: x\ndata: {train: rows.jsonl\n")
    refused("train cut.yaml", "cut.yaml, line 3: not valid YAML")
    (home / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    refused("train bytes.yaml", "bytes.yaml cannot be read", "save it as UTF-8 text")
    refused("train earlier", "the recipe earlier cannot be read: Is a directory; give the path of")


def test_an_unknown_key(refused: Refused, home: Path, tiny_model: Path) -> None:
    text = recipe_text(tiny_model, **{"train.warmpu": 3, "optimizer.lr": "fast"}).replace("method:", "methd:")
    (home / "typos.yaml").write_text(text)
    line = {key: text.splitlines().index(line) + 1 for line in text.splitlines() if (key := line.split(":")[0].strip())}
    refused(
        "train typos.yaml",
        f"typos.yaml, line {line['warmpu']}: there is no key train.warmpu. Did you mean 'warmup'?",
        f"typos.yaml, line {line['methd']}: there is no key methd. Did you mean 'method'",
        f"typos.yaml, line {line['lr']}: optimizer.lr is 'fast': input should be a valid number",
    )


def test_data_that_is_not_there(refused: Refused) -> None:
    refused("train recipe.yaml --data.train row.jsonl", "there is no file row.jsonl; is it rows.jsonl? (looked in ")


def test_an_empty_data_file(refused: Refused, home: Path) -> None:
    (home / "empty.jsonl").write_bytes(b"")
    refused("train recipe.yaml --data.train empty.jsonl", "empty.jsonl is empty (0 bytes); write rows into it")
    (home / "blank.jsonl").write_text("\n \n")
    refused("train recipe.yaml --data.train blank.jsonl", "blank.jsonl holds no rows; write some into it")


def test_a_half_written_gzip_file(refused: Refused, home: Path) -> None:
    lines = [json.dumps({"question": os.urandom(40).hex(), "answer": "x"}) for _ in range(200)]
    whole = gzip.compress("\n".join(lines).encode())
    (home / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    begin = "half.jsonl.gz: the gzip stream breaks off after line "
    refused("train recipe.yaml --data.train half.jsonl.gz", begin, "half-written or damaged, fetch or write it again")
    refused("data recipe.yaml --data.train half.jsonl.gz", begin)


def test_invalid_json_on_a_line(refused: Refused, home: Path) -> None:
    lines = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    lines[6], lines[11] = '{"question": "x", "answer": \n', "[1]\n"
    (home / "bad.jsonl").write_text("".join(lines))
    refused(
        "train recipe.yaml --data.train bad.jsonl",
        "bad.jsonl: 2 malformed",
        "line 7: invalid JSON: Expecting value at column 28",
        "line 12: a row is an object {...}, this is an array",
        "Correct or remove them.",
    )


def test_a_template_that_names_a_wrong_column(refused: Refused, home: Path, tiny_model: Path) -> None:
    (home / "recipe.yaml").write_text(recipe_text(tiny_model, **{"data.prompt": "{queston}"}))
    refused(
        "train recipe.yaml",
        "rows.jsonl: 40 of 40 rows cannot be trained on",
        "data.prompt names the column 'queston', which is not there. Did you mean 'question'?",
        "Columns seen: 'question', 'answer'.",
        "say in the recipe how to read them",
    )


def test_a_target_that_matches_nothing(refused: Refused) -> None:
    refused(
        "train recipe.yaml --method.targets [q_proj,k_prj]",
        "target 'k_prj' matches no module. Did you mean 'k_proj'",
        "Its layers end in: down_proj, embed_tokens, gate_proj,",
    )


def test_a_model_without_weights(refused: Refused, home: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, home / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    words = "bare is not a complete model folder", "no weights: model.safetensors", "Fetch or write the files again."
    refused("train recipe.yaml --model bare", *words)
    refused("generate bare --prompt x", *words)
    refused("merge bare --adapter earlier/adapter --into merged", *words)
    (home / "bare" / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:-7])
    refused("train recipe.yaml --model bare", "model.safetensors is cut short: ", "Fetch or write it again.")


BERT = {"model_type": "bert", "vocab_size": 384, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
ENCODER = ("is an encoder", "Nothing was loaded; give a causal language model (model: ...)")
NO_CHANGE_OF_A_WEIGHT = (
    "bottleneck cannot be restarted",
    "is no change of one weight; use lora, dora,",
    "leave restarts",
)
UNSUITED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "mora on an embedding": (
        {"method": {"name": "mora", "targets": ["embed_tokens"]}},
        {},
        (
            "method mora changes layers of kind linear only",
            "model.embed_tokens is a layer of kind embedding",
            "Leave them out of method.targets, or take a method that changes them",
        ),
    ),
    "r-hat above a dimension": (
        {"method": {"name": "mora", "rank": 40}},
        {},
        (
            "mora does not fit 14 of its 14 targets",
            "model.layers.0.self_attn.k_proj: mora.rank 40 makes a square matrix of side 44 for a layer with 32 inputs",
            "use at most rank 6 for it (rank_pattern), or exclude it",
        ),
    ),
    "bitfit without biases": (
        {"method": {"name": "bitfit"}},
        {},
        (
            "bitfit does not fit 14 of its 14 targets",
            "model.layers.0.self_attn.q_proj: this layer has no bias for bitfit to train; exclude it, or take another",
        ),
    ),
    "restarts of a bottleneck": (
        {"method": {"name": "bottleneck", "targets": ["o_proj"]}, "restarts": {"every": 2}},
        {},
        NO_CHANGE_OF_A_WEIGHT,
    ),
    "a prefix on an encoder": (
        {"method": {"name": "none"}, "prompt": {"name": "prefix"}},
        {**BERT, "architectures": ["BertModel"]},
        ("prompt prefix cannot be trained on bare: BertModel", *ENCODER),
    ),
    "a prompt on an encoder with a head": (
        {"prompt": {"name": "prompt"}, "method": {"name": "lora"}},
        {**BERT, "architectures": ["BertForMaskedLM"]},
        ("method lora and prompt prompt cannot be trained on bare: BertLMHeadModel", *ENCODER),
    ),
    "an encoder and a decoder": (
        {"method": {"name": "none"}, "prompt": {"name": "prefix"}},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        ("bare/config.json: transformers builds no causal model from it: ", "Give a causal language model."),
    ),
}


@pytest.mark.parametrize("case", UNSUITED)
def test_a_method_that_cannot_do_what_is_asked(
    refused: Refused, home: Path, tiny_model: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before any weight is read: the folder has only their headers."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("veneer.train.setup.load_model", never)
    changes, architecture, words = UNSUITED[case]
    copy_headers(tiny_model, home / "bare")
    if architecture:
        (home / "bare" / "config.json").write_text(json.dumps(architecture))
    recipe = yaml.safe_load((home / "recipe.yaml").read_text())
    (home / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "bare", **changes}))
    refused("train recipe.yaml", *words)


def test_folding_a_bottleneck(refused: Refused, home: Path, tiny_model: Path) -> None:
    recipe = yaml.safe_load((home / "recipe.yaml").read_text()) | {"method": {"name": "bottleneck", "targets": ["mlp"]}}
    (home / "blocks.yaml").write_text(yaml.safe_dump({**recipe, "run": "blocks"}))
    assert invoke(["train", "blocks.yaml"]) == 0
    refused(
        f"merge {tiny_model} --adapter blocks/adapter --into merged --data rows.jsonl",
        "model.layers.0.mlp: Bottleneck is not a change of one weight, so it cannot be folded into it.",
        "Nothing was written. Keep the adapter beside its model: `veneer generate MODEL --adapter DIR`",
    )


def test_a_weight_that_is_not_finite(refused: Refused, home: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, home / "nan")
    tensors = load_file(home / "nan" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, home / "nan" / "model.safetensors")
    words = (
        "up_proj.weight: quantize_4bit: the weight holds nan at position 101",
        "only finite numbers can be quantized",
    )
    refused("quantize nan --to quantized", *words)
    refused("train recipe.yaml --model nan --storage.name nf4", *words)


def test_quantized_weights_that_are_wrong(refused: Refused, home: Path, tiny_model: Path) -> None:
    assert invoke(["quantize", str(tiny_model), "--to", "four"]) == 0
    tensors = load_file(home / "four" / "model.safetensors")
    up, down = (f"model.layers.{layer}.weight" for layer in ("0.mlp.up_proj", "1.mlp.down_proj"))
    state = f"{down}.quant_state.bitsandbytes__nf4"
    tensors[state] = torch.tensor(list(bytes(tensors[state].tolist()).replace(b": 64,", b": 48,")), dtype=torch.uint8)
    del tensors[f"{up}.absmax"]
    save_file(tensors, home / "four" / "model.safetensors")
    refused(
        "train recipe.yaml --model four",
        f"{up} is not a complete 4-bit weight in bitsandbytes' layout:",
        "absmax: missing",
        f"{down} is not a complete 4-bit weight",
        "blocksize is 48, should be one of 32, 64,",
        "Nothing was loaded.",
    )


def test_too_little_memory_and_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "this run will not fit; nothing was loaded:", "but memory.budget leaves 1 MiB; below ", "nothing works"
    refused("train recipe.yaml --memory.budget 1MiB", *words, status=3)
    refused("train recipe.yaml --memory.budget plenty", "memory.budget: 'plenty' is not a size; write it like 8GiB")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**20, 2**20 - 4096, 4096))
    refused("train recipe.yaml", "disk: ", " to be written, but 4 KiB are free", status=3)


def test_a_model_that_is_not_there(refused: Refused) -> None:
    refused(
        "train recipe.yaml --model ./modles/x", "there is no model './modles/x'. Give an alias (smollm2-135m-instruct"
    )


def test_a_run_folder_that_is_taken(refused: Refused) -> None:
    refused("train recipe.yaml --run earlier", "earlier holds a run of another recipe:", "remove that one")
    refused("train recipe.yaml --run .", "holds other files", "give the run a folder of its own (run: ...)")


def test_a_file_where_a_folder_belongs(refused: Refused, tiny_model: Path) -> None:
    where = "cannot be a run's folder: ", "name another (run: ...)"
    refused(
        "train recipe.yaml --run rows.jsonl/run", "rows.jsonl/run " + where[0] + "Not a directory", where[1], status=1
    )
    refused("train recipe.yaml --run rows.jsonl", "rows.jsonl " + where[0] + "File exists", where[1], status=1)
    merge = f"merge {tiny_model} --adapter earlier/adapter --into rows.jsonl/merged"
    refused(merge, "rows.jsonl is a file; merge into a new folder elsewhere")
    merge = f"merge {tiny_model} --adapter earlier/adapter --into rows.jsonl"
    refused(merge, "rows.jsonl exists already; merge into a new folder, or remove that one")


def test_an_adapter_that_is_none(refused: Refused, tiny_model: Path) -> None:
    ask = f"generate {tiny_model} --prompt x --adapter"
    refused(f"{ask} earlyer", "there is no adapter folder earlyer. Did you mean 'earlier'?")
    refused(
        f"{ask} earlier", "adapter_config.json and adapter_model.safetensors missing", "Did you mean earlier/adapter?"
    )
    refused(f"{ask} rows.jsonl", "rows.jsonl is a file; an adapter is a folder that holds adapter_config.json")


def test_unknown_verbs_and_flags(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    refused("trian recipe.yaml", "there is no command 'trian'. Did you mean 'train'? There are: ", "train")
    refused("train recipe.yaml --train.stesp 3 --bogus", "--train.stesp. Did you mean 'train.steps'", "no key --bogus.")
    refused("generate x --promt y", "No such option: --promt", "--prompt", "Try 'veneer generate --help'")
    refused("merge x", "Missing option '--adapter'", "Try 'veneer merge --help'")
    assert invoke([]) == 2
    assert "`veneer COMMAND --help` shows its options and an example." in capsys.readouterr().out


def test_files_that_may_not_be_read(refused: Refused, tiny_model: Path) -> None:
    recipe, rows, weights = Path("recipe.yaml"), Path("rows.jsonl"), tiny_model / "model.safetensors"
    refused("train recipe.yaml", "the recipe recipe.yaml cannot be read: Permission denied", denied=recipe)
    refused("train recipe.yaml", "rows.jsonl cannot be read: Permission denied", denied=rows)
    words = f"veneer: {weights}: Permission denied. Change its permissions, or name another place."
    refused(f"generate {tiny_model} --prompt x", words, denied=weights, status=1)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="writes to a place where nobody may")
def test_a_place_that_may_not_be_written(refused: Refused, tiny_model: Path) -> None:
    refused("train recipe.yaml --run /proc/run", "/proc/run cannot be a run's folder", "name another", status=1)
    merge = f"merge {tiny_model} --adapter earlier/adapter --into /proc/merged"
    refused(merge, "/proc/merged was not written: ", "Earlier files are whole", status=1)


@pytest.fixture
def small_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A folder `disk` of 72 KiB; what is yielded makes room.  Where none can be mounted, tensors' bytes are counted."""
    disk, size = home / "disk", 72 * 1024
    disk.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
        return bool(shutil.which("mount")) and not subprocess.run(command, capture_output=True).returncode

    if mount(f"size={size}"):
        yield lambda: None if mount("remount", "size=8m") else pytest.fail("the disk could not be made larger")
        subprocess.run(["umount", str(disk)], check=True)
        return
    used, room, write = [0], [size * 2 // 3], TensorWriter.write

    def counting(self: TensorWriter, name: str, tensor: Tensor) -> None:
        used[0] += tensor.nbytes
        if used[0] > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", counting)
    yield lambda: room.__setitem__(0, sys.maxsize)


def test_a_disk_that_fills_up_in_training(
    home: Path, small_disk: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "recipe.yaml", "--train.checkpoint_every", "1"]
    before = files_of(home)
    assert invoke([*command, "--run", "disk/run"]) == 1
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith(f"veneer: the disk is full: {home}/disk/run/checkpoints/step-2/state.safetensors was not")
    assert "Earlier files are whole; free some space and run again." in message
    assert captured.out == "" and "Traceback" not in captured.err
    run = home / "disk" / "run"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "events.jsonl", "recipe.yaml"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-1"], "nothing half-written, the first one whole"
    assert load_file(run / "checkpoints" / "step-1" / "state.safetensors")
    assert {n: b for n, b in files_of(home).items() if not n.startswith("disk")} == before
    small_disk()
    assert invoke([*command, "--run", "disk/run"]) == 0
    assert "resuming after step 1" in capsys.readouterr().err
    assert invoke([*command, "--run", "ample"]) == 0
    adapters = [home / r / "adapter" / "adapter_model.safetensors" for r in ("disk/run", "ample")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_disk_that_fills_up_in_merging(
    home: Path, small_disk: Callable[[], None], tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(home)
    command = [
        "merge",
        str(tiny_model),
        "--adapter",
        "earlier/adapter",
        "--into",
        "disk/merged",
        "--data",
        "rows.jsonl",
    ]
    assert invoke(command) == 1
    captured = capsys.readouterr()
    assert f"the disk is full: {home}/disk/merged/model.safetensors was not written" in captured.err.splitlines()[-1]
    assert captured.out == "" and "Traceback" not in captured.err
    assert files_of(home) == before and not any((home / "disk").iterdir())
    small_disk()
    assert invoke(command) == 0


def test_ctrl_c(home: Path) -> None:
    command = [sys.executable, "-m", "veneer", "train", "recipe.yaml", "--train.steps", "100", "--json"]
    before, events = files_of(home), home / "run" / "events.jsonl"
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet)
    while training.poll() is None and not (events.exists() and events.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    training.send_signal(signal.SIGINT)
    out, err = training.communicate(timeout=60)
    assert (training.returncode, out) == (1, ""), err
    assert err.splitlines()[-1] == "veneer: interrupted. The same command resumes the run in run."
    assert "Traceback" not in err and not (home / "run" / "adapter").exists()
    assert {name: files_of(home).get(name) for name in before} == before
    done = len(events.read_text().splitlines())
    assert [p.name for p in (home / "run" / "checkpoints").iterdir()] == [f"step-{done}"]
    assert invoke(command[3:]) == 0
    assert [json.loads(line)["step"] for line in events.read_text().splitlines()] == list(range(1, 101))
    result = json.loads((home / "run" / "result.json").read_text())
    assert result["resumed_from"] == done and result["steps"] == 100
