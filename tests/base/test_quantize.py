"""A base whose weights are quantized as they are read: the same as quantizing it afterwards, and what hangs on it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.adapters.told import Told
from tests.contracts.test_methods import SETTINGS
from tests.methods.layers import moved
from veneer.adapters.attach import attach, load_adapter
from veneer.base import load, quantize
from veneer.base.base import Base
from veneer.base.fingerprint import base_fingerprint
from veneer.base.load import load_model
from veneer.base.quant_cache import cache_folder
from veneer.base.storage_config import base_storage, storage_of
from veneer.disk import tensors
from veneer.disk.tensors import open_tensors, write_model_tensors
from veneer.errors import AdapterMismatch, ConfigError, DiskError, ModelError, NotFoldable
from veneer.kernels import native
from veneer.merge.fold import merge
from veneer.methods.base import METHODS, config_from
from veneer.storage import STORAGES
from veneer.storage.layers import StoredEmbedding, StoredLinear

IDS = torch.arange(40)[None]
NF4 = base_storage("nf4")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def loaded(base: Path, storage: Any = "nf4", **more: Any) -> Base:
    return load_model(base, storage=base_storage(storage), dtype="float32", **more)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def stored(model: nn.Module) -> dict[str, Any]:
    return {p: m for p, m in model.named_modules() if isinstance(m, StoredLinear | StoredEmbedding)}


def dequantized(base: Path, model: Any) -> Any:
    """A dense model with the weights that `model` computes with, put in by hand."""
    dense: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    for path, module in stored(model).items():
        weight = dense.get_submodule(path).weight
        w = module.storage.dense(torch.float32)
        weight.data.copy_(w.T if module.__dict__.get("transposed") else w)
    return dense


CHOICES = [
    "nf4",
    "fp4",
    "int8",
    {"name": "nf4", "block": 32, "double_quant": False},
    {"name": "nf4", "embeddings": True},
]


@pytest.mark.parametrize("storage", CHOICES, ids=str)
def test_every_linear_layer_is_what_its_storage_makes_of_it(tiny_model: Path, storage: Any) -> None:
    model = loaded(tiny_model, storage).network
    dense = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    kept = base_storage(storage)
    assert kept is not None
    linear = {p for p, m in dense.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    more = {"lm_head", "model.embed_tokens"} if kept.embeddings else set()
    assert set(stored(model)) == linear | more
    for path in linear:
        w = dense.get_submodule(path).weight.detach()
        want = STORAGES[kept.config.storage].of(w, kept.config).dense(torch.float32)
        assert torch.equal(model.get_submodule(path).storage.dense(torch.float32), want)
    assert torch.allclose(logits(model), logits(dequantized(tiny_model, model)), atol=1e-4)
    assert not torch.allclose(logits(model), logits(dense), atol=1e-2)
    assert storage_of(model) == kept
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_an_untied_head_is_kept_too_if_asked(tiny_untied: Path) -> None:
    model = loaded(tiny_untied, {"name": "nf4", "head": True}).network
    assert "lm_head" in stored(model) and "model.embed_tokens" not in stored(model)
    assert storage_of(model) == base_storage({"name": "nf4", "head": True})
    assert torch.allclose(logits(model), logits(dequantized(tiny_untied, model)), atol=1e-4)


def test_a_tied_head_alone_is_refused(tiny_model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"storage\.head is true, but this model's output head is its input embedding"
    ):
        loaded(tiny_model, {"name": "nf4", "head": True})


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, made_model: Callable[..., Path]) -> Path:
    """Conv1D layers, square ones among them, whose files lack the `transformer.` prefix."""
    folder = made_model(tmp_path_factory.mktemp("gpt2") / "base")
    shape = GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=64, vocab_size=384, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(shape).save_pretrained(folder)
    tensors = open_tensors(folder)
    specs = {n.removeprefix("transformer."): (e.dtype, e.shape) for n, e in tensors.items()}
    renamed = [(n.removeprefix("transformer."), tensors.read(n)) for n in tensors]
    write_model_tensors(folder, specs, renamed)
    return folder


def test_gpt2s_turned_weights(gpt2: Path, tmp_path: Path) -> None:
    first, again = loaded(gpt2), loaded(gpt2)
    assert len(stored(first.network)) == 8
    assert torch.allclose(logits(first.network), logits(dequantized(gpt2, first.network)), atol=1e-4)
    assert torch.equal(logits(first.network), logits(again.network))
    adapter = attach(first.network, config_from("lora", {"rank": 2}), ("c_proj", "c_attn")).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.1, seed=n)
    want = logits(first.network)
    merge(adapter, first.folder, tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged.eval()), want, atol=1e-3)


@pytest.mark.parametrize("kind", [None, "int8", "nf4", {"name": "nf4", "block": 32, "backend": "bitsandbytes"}])
def test_where_the_c_library_is_missed_it_is_said_before_quantizing(
    kind: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        native, "load", lambda: native.Status(False, None, None, "no compiler; install one\nmore words")
    )
    told: list[str] = []
    load_model(tiny_model, storage=None if kind is None else base_storage(kind), say=told.append)
    assert [line for line in told if "quantizing" not in line] == (
        ["plain torch computes with 4-bit weights, slower: no compiler; install one"] if kind == "nf4" else []
    )
    assert kind != "nf4" or "quantizing" in told[1]


def test_of_a_folder_that_is_quantized_it_is_said_too(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(tiny_model)
    (folder,) = [p.parent for p in cache.rglob("config.json")]
    monkeypatch.setattr(native, "load", lambda: native.Status(False, None, None, "a reason"))
    told: list[str] = []
    load_model(folder, storage=None, say=told.append)
    assert told == ["plain torch computes with 4-bit weights, slower: a reason"]


def test_the_second_start_maps_what_the_first_wrote(
    tmp_path: Path, made_model: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = made_model(tmp_path / "base", hidden_size=64, intermediate_size=128)  # codes of a page
    told = Told()
    first = loaded(base, say=told.append)
    assert told == [f"quantizing {base} to nf4 (block 64, double_quant True) (once)"]
    monkeypatch.setattr(quantize.Quantizer, "_quantize", None)
    again = loaded(base, say=told.append)
    assert len(told) == 1
    assert torch.equal(logits(first.network), logits(again.network))
    assert base_fingerprint(first.network) == base_fingerprint(again.network)
    assert first.folder == again.folder == base
    (folder,) = [f for f in cache.iterdir() if f.name != "hashes"]
    codes = again.network.model.layers[0].mlp.up_proj.storage.codes
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ranges = [tuple(int(x, 16) for x in line[0].split("-")) for line in maps]
    assert any(low <= codes.data_ptr() < high for low, high in ranges), "the codes are not where the file is mapped"


@pytest.fixture(scope="module")
def broad(tmp_path_factory: pytest.TempPathFactory, made_model: Callable[..., Path]) -> Path:
    """Codes of 128 to 512 KiB, in shards."""
    folder = made_model(tmp_path_factory.mktemp("broad") / "base", hidden_size=512, intermediate_size=2048)
    files = open_tensors(folder)
    tensors = {name: files.read(name) for name in files}
    specs = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    write_model_tensors(folder, specs, tensors.items(), shard_bytes=5_000_000)
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is in memory")
def test_loading_from_the_cache_touches_no_page_of_the_codes(broad: Path, cache: Path) -> None:
    """Each touch would fetch what lies around it: on a disk that reads 8 MB ahead, the whole file."""
    loaded(broad)
    model = loaded(broad).network
    (file,) = cache.glob("*/model.safetensors")
    at, mapped, resident = False, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            at = line.endswith(str(file))
        elif at and line.startswith(("Size:", "Rss:")):
            mapped += int(line.split()[1]) * 1024 * line.startswith("Size:")
            resident += int(line.split()[1]) * 1024 * line.startswith("Rss:")
    codes = sum(m.storage.codes.nbytes for m in stored(model).values())
    assert mapped > codes > 3_000_000
    assert resident < 16_384


@pytest.mark.parametrize("paged", [False, True], ids=["in memory", "paged"])
def test_a_start_reads_each_header_once(
    broad: Path, tmp_path: Path, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "refuse_memory", lambda *_: None)
    monkeypatch.setattr(tensors, "SETTLED", 0.01)
    loaded(broad)
    time.sleep(0.05)
    tensors._header.cache_clear()
    read: list[str] = []
    real = Path.open

    def seen(self: Path, *args: Any, **more: Any) -> Any:
        if sys._getframe(1).f_code.co_name == "_header":
            read.append(self.name)
        return real(self, *args, **more)

    monkeypatch.setattr(Path, "open", seen)
    loaded(broad, paged=paged)
    shards = sorted(file.name for file in broad.glob("*.safetensors"))
    assert sorted(read) == sorted(["model.safetensors", *shards])


def test_other_settings_and_other_weights_are_quantized_anew(tiny_model: Path, tmp_path: Path) -> None:
    told = Told()
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    for storage in ("nf4", "fp4", {"name": "nf4", "block": 128}, "nf4"):
        loaded(base, storage, say=told.append)
    assert len(told) == 3
    tensors = open_tensors(base)
    changed = [(n, tensors.read(n) + (n.endswith("down_proj.weight"))) for n in tensors]
    write_model_tensors(base, {n: (e.dtype, e.shape) for n, e in tensors.items()}, changed)
    model = loaded(base, say=told.append).network
    assert len(told) == 4
    assert model.model.layers[0].mlp.down_proj.storage.dense(torch.float32).mean() > 0.9


def test_what_a_killed_quantization_left_is_cleared(tiny_model: Path, cache: Path) -> None:
    left = cache / f".{'ab' * 32}.0123abcd.tmp"  # of another model
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    loaded(tiny_model)
    assert not left.exists()


def test_a_damaged_copy_is_made_anew(tiny_model: Path, cache: Path) -> None:
    told = Told()
    want = logits(loaded(tiny_model).network)
    (file,) = cache.glob("*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(logits(loaded(tiny_model, say=told.append).network), want)
    assert "are damaged and made anew" in told[0] and "quantizing" in told[1]
    told.clear()
    loaded(tiny_model, say=told.append)
    assert told == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "content.sha256"])
def test_a_copy_with_one_bit_changed_is_made_anew(tiny_model: Path, cache: Path, name: str) -> None:
    told = Told()
    want = logits(loaded(tiny_model).network)
    (file,) = cache.glob(f"*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    about = file.stat()
    time.sleep(0.02)  # the clock of file systems ticks every few milliseconds
    with file.open("r+b") as opened:  # where it lies: the same inode, size and date
        opened.write(data)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert torch.equal(logits(loaded(tiny_model, say=told.append).network), want)
    assert "damaged and made anew" in told[0] and "does not hold what was written" in told[0]
    told.clear()
    loaded(tiny_model, say=told.append)
    assert told == []


def test_a_copy_without_its_hash_is_made_anew(tiny_model: Path, cache: Path) -> None:
    told = Told()
    loaded(tiny_model)
    (seal,) = cache.glob("*/content.sha256")
    seal.unlink()
    loaded(tiny_model, say=told.append)
    assert "content.sha256" in told[0] and "quantizing" in told[1]
    assert seal.exists()


def test_a_base_overwritten_where_it_lies_with_its_old_date_is_quantized_anew(tiny_model: Path, tmp_path: Path) -> None:
    base, told = tmp_path / "base", Told()
    shutil.copytree(tiny_model, base)
    loaded(base, say=told.append)
    file = base / "model.safetensors"
    before, data = file.stat(), bytearray(file.read_bytes())
    at = open_tensors(base)[UP].start
    data[at : at + 64] = bytes(64)
    with file.open("r+b") as opened:
        time.sleep(0.02)  # the clock of file systems ticks every few milliseconds
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    loaded(base, say=told.append)
    assert len(told) == 2


def test_two_starts_at_once_leave_one_whole_copy(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins and ends while the first writes, and is replaced by it while its weights are in use."""
    told = Told()
    others: list[Any] = []
    real = load.cache_quantized

    def late(*args: Any) -> None:
        if not others:
            others.append(None)
            others[:] = [loaded(tiny_model, say=told.append).network, loaded(tiny_model, say=told.append).network]
        real(*args)

    monkeypatch.setattr(load, "cache_quantized", late)
    want = logits(loaded(tiny_model, say=told.append).network)
    assert [line.startswith("quantizing") for line in told] == [True, True]
    assert torch.equal(logits(others[0]), want) and torch.equal(logits(others[1]), want)
    assert torch.equal(logits(loaded(tiny_model, say=told.append).network), want) and len(told) == 2
    assert len(list(cache.glob("*/model.safetensors"))) == 1 and not list(cache.glob(".*"))


def test_a_full_disk_costs_only_the_next_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise DiskError("the disk is full")

    told = Told()
    monkeypatch.setattr(load, "cache_quantized", full)
    assert stored(loaded(tiny_model, say=told.append).network)
    assert told[1] == "the quantized weights are not kept for the next start: the disk is full"


def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to(
    tiny_model: Path, tiny_untied: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_untied, base)
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    want = logits(load_model(base, dtype="float32").network)
    for _ in range(2):  # quantized, then mapped
        model = loaded(base, {"name": "int8", "embeddings": True}).network
        assert set(stored(model)) >= {"model.embed_tokens"} and "lm_head" not in stored(model)
        assert float((logits(model) - want).norm() / want.norm()) < 0.1


def test_quantizing_does_not_depend_on_the_compute_dtype(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = loaded(tiny_model).network
    monkeypatch.setattr(load, "sealed_copy", lambda base, storage, say: (cache_folder(base, storage), False))
    narrow = load_model(tiny_model, storage=NF4, dtype="bfloat16").network
    assert narrow.dtype == torch.bfloat16
    for path, module in stored(wide).items():
        assert torch.equal(module.storage.codes, narrow.get_submodule(path).storage.codes)


def broken(tiny_model: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A quantized folder with something wrong in it."""
    from veneer.base.quant_cache import quantize_weights, write_quantized

    made = quantize.Quantizer(NF4)
    quantize_weights(tiny_model, made)
    write_quantized(tiny_model, folder, made)
    files = open_tensors(folder)
    tensors = {name: files.read(name) for name in files}
    change(tensors)
    write_model_tensors(folder, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items())
    return folder


UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"


def both(tensors: dict[str, Tensor]) -> None:
    tensors.pop(f"{UP}.absmax")
    tensors[DOWN] = tensors[DOWN][:-1]


def other_shape(tensors: dict[str, Tensor]) -> None:
    state = json.loads(bytes(tensors[UP + STATE].tolist()))
    state["shape"] = state["shape"][::-1]
    tensors[UP + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (both, rf"(?s){UP} is not a complete.*absmax: missing.*{DOWN}.*the codes hold 1023 bytes"),
        (lambda t: t.pop(UP), rf"(?s){UP} is not a complete 4-bit weight.*the codes hold 0 bytes"),
        (lambda t: t.pop(UP + STATE), rf"(?s){UP} is not a complete.*there should be one key .*found none"),
        (lambda t: t.update({f"{UP}.quant_state.bitsandbytes__fp4": t[UP + STATE]}), r"(?s)there should be one key"),
        (
            lambda t: t.update({f"{UP}.quant_state.bitsandbytes__nf5": t.pop(UP + STATE)}),
            rf"(?s){UP} is not a complete.*, found .*nf5",
        ),
        (
            lambda t: t.update({f"{UP}.zeros": torch.zeros(1)}),
            rf"(?s){UP} is not a complete.*zeros: not a key of this layout",
        ),
        (
            lambda t: t.update({f"{UP}.nested_absmax": torch.full((1,), float("nan"))}),
            r"(?s)nested_absmax holds numbers",
        ),
        (other_shape, rf"{UP}: \(32, 64\) in the files, \(64, 32\) in the model"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)], rf"{UP}: needed by the model, not in the files"),
        (
            lambda t: t.update({"x.weight.absmax": torch.zeros(1)}),
            r"x\.weight\.absmax: in the files, unknown to the mo",
        ),
    ],
)
def test_a_folder_with_something_wrong_in_it(
    tiny_model: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    folder = broken(tiny_model, tmp_path / "broken", change)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder, storage=None, dtype="float32")
    assert "Nothing was loaded" in str(caught.value)


def test_quantized_folders_stay_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    folder = broken(tiny_model, tmp_path / "whole", lambda _: None)
    want = logits(loaded(tiny_model).network)
    for storage in ("dense", "nf4"):
        model = loaded(folder, storage).network
        assert torch.equal(logits(model), want)
        assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ModelError, match=r"is kept as nf4 \(block 64, double_quant True\) already, asked for is fp4"):
        loaded(folder, "fp4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="holds weights quantized by gptq"):
        loaded(folder, "dense")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": ["nf4"]}))
    with pytest.raises(ModelError, match="transformers builds no causal model from it"):
        loaded(folder, "dense")


def test_weights_that_cannot_be_quantized_are_named_together(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    files = open_tensors(base)
    tensors = {name: files.read(name) for name in files}
    for name in (UP, DOWN):
        tensors[name][3, 2] = float("nan")
    write_model_tensors(base, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items())
    with pytest.raises(ModelError, match=rf"(?s)2 weights cannot be quantized:\n  {UP}:.*  {DOWN}:"):
        loaded(base)
    tensors.pop(UP)
    write_model_tensors(base, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items())
    with pytest.raises(ModelError, match="cannot be quantized"):
        loaded(base)


def test_the_adapters_gradients_are_those_over_the_dequantized_base(tiny_model: Path) -> None:
    ours = loaded(tiny_model).network
    theirs = dequantized(tiny_model, ours)
    grads = []
    for model in (ours, theirs):
        adapter = attach(model, config_from("lora", {"rank": 2, "init": "random"})).eval()
        model(IDS).logits.square().mean().backward()
        grads.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


def test_a_step_moves_the_adapter_and_nothing_else(tiny_model: Path) -> None:
    model = loaded(tiny_model).network
    adapter = attach(model, config_from("lora", {"rank": 2, "init": "random"}))
    before = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    began = [p.detach().clone() for p in adapter.parameters()]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(IDS).logits.square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]), name
    assert not any(torch.equal(a, b) for a, b in zip(began, adapter.parameters(), strict=True))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory, made_model: Callable[..., Path]) -> Path:
    """With biases, which some methods train."""
    folder = made_model(tmp_path_factory.mktemp("biased") / "base", attention_bias=True, mlp_bias=True)
    tensors = open_tensors(folder)
    rng = torch.Generator().manual_seed(0)
    changed = [(n, torch.randn(e.shape, generator=rng) if "bias" in n else tensors.read(n)) for n, e in tensors.items()]
    write_model_tensors(folder, {n: (e.dtype, e.shape) for n, e in tensors.items()}, changed)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_nf4(biased: Path, tmp_path: Path, method: str) -> None:
    """Trained, saved, loaded on the same base, merged into what it was trained on."""
    base = loaded(biased)
    model = base.network
    config = config_from(method, (SETTINGS.get(method) or [{}])[0])
    targets = "all-linear" if "linear" in METHODS[method].kinds else ("mlp",)
    adapter = attach(model, config, targets, look=lambda: model(IDS)).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.1, seed=n)
    model(IDS).logits.square().mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())
    want = logits(model)
    adapter.save(tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "veneer.json").read_text())
    assert facts["base"]["storage"] == NF4.settings
    again = loaded(biased)
    load_adapter(again.network, tmp_path / "adapter")
    assert torch.allclose(logits(again.network), want, atol=1e-4)
    try:
        merge(adapter, base.folder, tmp_path / "merged")
    except NotFoldable:
        return
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert torch.allclose(logits(merged), want, atol=2e-3)


def test_a_merge_is_dequantized_everywhere(tiny_model: Path, tmp_path: Path) -> None:
    """From the dense base's files and from a quantized folder, layers without a delta too, embeddings if kept so."""
    folder = broken(tiny_model, tmp_path / "whole", lambda _: None)
    for n, (base, storage) in enumerate(
        [(tiny_model, "nf4"), (folder, "dense"), (tiny_model, {"name": "nf4", "embeddings": True})]
    ):
        there = loaded(base, storage)
        adapter = attach(there.network, config_from("lora", {"rank": 2, "init": "random"}), ("q_proj",)).eval()
        want = logits(there.network)
        merge(adapter, there.folder, tmp_path / f"merged{n}", dtype=torch.float32)
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{n}", dtype=torch.float32).eval()
        assert torch.allclose(logits(merged), want, atol=1e-4)


def test_an_int8_folder_is_merged_in_its_models_number_type(tiny_model: Path, tmp_path: Path) -> None:
    """Its layout does not say which; float16, which bitsandbytes computes in, ends at 65504."""
    from veneer.base.quant_cache import quantize_weights, write_quantized

    made = quantize.Quantizer(base_storage("int8"))
    quantize_weights(tiny_model, made)
    write_quantized(tiny_model, tmp_path / "int8", made)
    base = load_model(tmp_path / "int8", storage=None, dtype="bfloat16")
    merge(attach(base.network, config_from("lora", {"rank": 2})), base.folder, tmp_path / "merged")
    assert {entry.dtype for entry in open_tensors(tmp_path / "merged").values()} == {torch.float32}


def test_an_adapter_knows_its_base_and_how_it_was_kept(tiny_model: Path, tiny_untied: Path, tmp_path: Path) -> None:
    adapter = attach(loaded(tiny_model).network, config_from("lora", {"rank": 2, "init": "random"}))
    adapter.save(tmp_path / "nf4")
    for storage, kept in (("fp4", "fp4 "), ("dense", "dense"), ({"name": "nf4", "double_quant": False}, "nf4 ")):
        other = loaded(tiny_model, storage).network
        with pytest.raises(
            AdapterMismatch, match=rf"were kept as nf4 \(block 64, double_quant True\), those here.* {kept}"
        ):
            load_adapter(other, tmp_path / "nf4")
        assert load_adapter(other, tmp_path / "nf4", allow_other_base=True).attached
    with pytest.raises(AdapterMismatch, match="weights are not those it was trained on"):
        load_adapter(loaded(tiny_untied).network, tmp_path / "nf4")
    dense = attach(loaded(tiny_model, "dense").network, config_from("lora", {"rank": 2, "init": "random"}))
    dense.save(tmp_path / "dense")
    with pytest.raises(AdapterMismatch, match="were kept as dense, those here are kept as nf4"):
        load_adapter(loaded(tiny_model).network, tmp_path / "dense")


@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_may_compute(tmp_path: Path, tiny_model: Path, made_model: Callable[..., Path]) -> None:
    wide = made_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    theirs = loaded(wide, {"name": "nf4", "backend": "bitsandbytes"}).network
    assert all(m.storage.backend == "bitsandbytes" for m in stored(theirs).values())
    assert float((logits(theirs) - logits(loaded(wide).network)).abs().max()) < 1e-4
    adapter = attach(theirs, config_from("lora", {"rank": 2, "init": "random"}))
    theirs(IDS).logits.square().mean().backward()
    assert all(bool(p.grad.any()) for p in adapter.parameters())
    adapter.save(tmp_path / "adapter")
    load_adapter(loaded(wide).network, tmp_path / "adapter")  # whose kernels computed does not matter
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.q_proj: its rows of 32 are not a multiple of the block"
    ):
        loaded(tiny_model, {"name": "nf4", "backend": "bitsandbytes"})


MEMORY = """
import json, sys, torch
from pathlib import Path
from veneer import machine
from veneer.base.storage_config import base_storage
from veneer.base.load import load_model
from veneer.disk.tensors import open_tensors
base, warm = Path(sys.argv[1]), Path(sys.argv[2])
load_model(warm, storage=base_storage("nf4"), dtype="bfloat16")
load_model(warm, storage=base_storage("nf4"), dtype="bfloat16")
sizes = [e.nbytes for e in open_tensors(base).values()]
before = machine.rss_bytes()
machine.reset_peak_rss()
model = load_model(base, storage=base_storage("nf4"), dtype="bfloat16").network
stored = sum(b.numel() * b.element_size() for b in model.buffers())
dense = sum(p.numel() * p.element_size() for p in model.parameters())
kept, peak = stored + dense, machine.peak_rss_bytes() - before
print(json.dumps({"base": sum(sizes), "largest": max(sizes), "kept": kept, "peak": peak}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset elsewhere")
@pytest.mark.skipif(native.library() is None, reason="plain torch quantizes a tensor in several float32 copies of it")
def test_peak_memory_is_the_quantized_model_and_one_tensor(
    tmp_path: Path, tiny_model: Path, made_model: Callable[..., Path]
) -> None:
    base = made_model(tmp_path / "base", hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(base), str(tiny_model)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=one).stdout)
    assert found["base"] > 150e6 > 2 * found["kept"]
    assert found["peak"] < found["kept"] + 2 * found["largest"] + 8e6, found  # a weight, and its codes being made
