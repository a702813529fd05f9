"""A merged folder, loaded by transformers alone, says what the unmerged model says; a failed merge leaves nothing."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.methods.layers import moved
from tests.methods.parity import logits
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.base.load import load_model
from veneer.disk.tensors import TensorWriter, open_tensors, write_model_tensors
from veneer.errors import ConfigError, DiskError, ModelError, NotFoldable
from veneer.merge.fold import merge
from veneer.methods.base import config_from

LORA = {"rank": 2, "alpha": 4.0}


def adapted(base: Path, targets: Any, method: str = "lora", **settings: Any) -> Adapter:
    """A random adapter on `base`, in float32, that moves the logits visibly."""
    model = load_model(base, dtype="float32").network
    plain = logits(model)
    adapter = attach(model, config_from(method, settings or (LORA if method == "lora" else {})), targets).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.2, seed=n)
    assert far(logits(model), plain) > 0.01, "the adapter changes too little for a comparison"
    return adapter


def loaded(folder: Path) -> Any:
    """As its user would: transformers, no veneer; every weight has to be there."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def far(a: Tensor, b: Tensor) -> float:
    """Relative to the size of b."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def config_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, made_model: Callable[..., Path]) -> Path:
    """Conv1D layers with biases, tied embeddings, and files without the `transformer.` prefix, as GPT-2's own are."""
    folder = made_model(tmp_path_factory.mktemp("gpt2") / "base")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        shape = {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2, initializer_range=0.2))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    headless = {k.removeprefix("transformer."): t for k, t in model.state_dict().items() if k != "lm_head.weight"}
    (folder / "model.safetensors").unlink()
    model.config.save_pretrained(folder)
    write_model_tensors(folder, {k: (t.dtype, tuple(t.shape)) for k, t in headless.items()}, headless.items())
    return folder


METHODS = [
    ("lora", {**LORA, "rank_stabilized": True, "rank_pattern": {"q_proj": 5}}),
    ("mora", {"rank": 2}),
    ("dora", {"rank": 2}),
    ("ia3", {}),
    ("full", {}),
]


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=[m for m, _ in METHODS])
def test_transformers_loads_it_with_the_unmerged_logits(
    tiny_model: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    adapter = adapted(tiny_model, "all-linear", method, **settings)
    want, told = logits(adapter.model), []
    size = merge(adapter, tiny_model, tmp_path / "merged", progress=lambda done, total: told.append((done, total)))
    assert far(logits(loaded(tmp_path / "merged")), want) <= 1e-5
    assert size == sum(f.stat().st_size for f in (tmp_path / "merged").iterdir())
    count = len(open_tensors(tiny_model))
    assert told == [(n, count) for n in range(1, count + 1)]
    assert config_of(tmp_path / "merged") == config_of(tiny_model), "still tied, same dtype"
    assert torch.equal(logits(adapter.model), want) and adapter.attached, "the model in memory stays as it was"


def test_the_folder_has_all_that_a_model_needs(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model.iterdir():
        (base / file.name).symlink_to(file)  # as the hub's cache keeps them
    for name in ("LICENSE.md", "merges.txt", "model.safetensors.index.json.bak", "adapter.bin"):
        (base / name).write_text("{}")
    (base / "notes.json").mkdir()
    merge(adapted(base, ("q_proj",)), base, tmp_path / "merged")
    got = {f.name for f in (tmp_path / "merged").iterdir()}
    assert got == {f.name for f in tiny_model.iterdir()} | {"LICENSE.md", "merges.txt"}
    assert not any(f.is_symlink() for f in (tmp_path / "merged").iterdir())
    ids = [AutoTokenizer.from_pretrained(f)("Which city?")["input_ids"] for f in (base, tmp_path / "merged")]
    assert ids[0] == ids[1]


EMBEDDINGS = [
    ("embed_tokens",),
    ("lm_head",),
    ("embed_tokens", "lm_head"),
    ("embed_tokens", "q_proj"),
]


@pytest.mark.parametrize("targets", EMBEDDINGS, ids="+".join)
def test_tied_embeddings_come_apart_where_the_fold_makes_them_differ(
    tiny_model: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    adapter = adapted(tiny_model, targets)
    merge(adapter, tiny_model, tmp_path / "merged")
    model = loaded(tmp_path / "merged")
    assert far(logits(model), logits(adapter.model)) <= 1e-5
    assert config_of(tmp_path / "merged")["tie_word_embeddings"] is False
    ends = {"embed_tokens": model.model.embed_tokens.weight, "lm_head": model.lm_head.weight}
    base = open_tensors(tiny_model).read("model.embed_tokens.weight")
    assert {name for name, weight in ends.items() if not torch.equal(weight, base)} == {*targets} - {"q_proj"}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_untied_embeddings_stay_two(tiny_untied: Path, tmp_path: Path, target: str) -> None:
    adapter = adapted(tiny_untied, (target,))
    merge(adapter, tiny_untied, tmp_path / "merged")
    assert far(logits(loaded(tmp_path / "merged")), logits(adapter.model)) <= 1e-5
    assert config_of(tmp_path / "merged")["tie_word_embeddings"] is False


@pytest.mark.parametrize("held", [["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]], ids=len)
def test_files_that_hold_tied_weights_under_the_heads_name_or_twice(
    made_model: Callable[..., Path], tmp_path: Path, held: list[str]
) -> None:
    base = made_model(tmp_path / "base")
    stored = open_tensors(base)
    tensors = {n: stored.read(n) for n in stored if n != "model.embed_tokens.weight"}
    tensors |= {name: stored.read("model.embed_tokens.weight") for name in held}
    write_model_tensors(base, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, tensors.items())
    adapter = adapted(base, ("embed_tokens",))
    merge(adapter, base, tmp_path / "merged")
    assert far(logits(loaded(tmp_path / "merged")), logits(adapter.model)) <= 1e-5


GPT2 = [  # targets, method, what changes in every block, what changes outside
    (("c_attn", "mlp.c_proj"), "lora", {"attn.c_attn.weight", "mlp.c_proj.weight"}, set()),
    (("c_attn", "wte"), "lora", {"attn.c_attn.weight"}, {"wte.weight", "lm_head.weight"}),
    (("c_attn", "c_fc"), "bitfit", {"attn.c_attn.bias", "mlp.c_fc.bias"}, set()),
    (("c_attn", "mlp.c_proj"), "ia3", {"attn.c_attn.weight", "attn.c_attn.bias", "mlp.c_proj.weight"}, set()),
]


@pytest.mark.parametrize(
    ("targets", "method", "inside", "outside"), GPT2, ids=lambda v: v if isinstance(v, str) else ""
)
def test_gpt2s_turned_weights_and_biases(
    gpt2: Path, tmp_path: Path, targets: tuple[str, ...], method: str, inside: set[str], outside: set[str]
) -> None:
    adapter = adapted(gpt2, targets, method)
    merge(adapter, gpt2, tmp_path / "merged")
    merged, base = open_tensors(tmp_path / "merged"), open_tensors(gpt2)
    changed = {n for n in merged if n not in base or not torch.equal(merged.read(n), base.read(n))}
    assert changed == {f"h.{i}.{name}" for i in (0, 1) for name in inside} | outside
    assert far(logits(loaded(tmp_path / "merged")), logits(adapter.model)) <= 1e-5


def test_biases_of_linear_layers(made_model: Callable[..., Path], tmp_path: Path) -> None:
    base = made_model(tmp_path / "base", attention_bias=True)
    adapter = adapted(base, ("q_proj", "v_proj"), "bitfit")
    merge(adapter, base, tmp_path / "merged")
    assert far(logits(loaded(tmp_path / "merged")), logits(adapter.model)) <= 1e-5


def test_a_layer_that_stands_in_two_places_is_folded_in_both(made_model: Callable[..., Path], tmp_path: Path) -> None:
    base = made_model(tmp_path / "base")
    stored = open_tensors(base)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    tensors = {n: stored.read(names[0] if n == names[1] else n) for n in stored}
    write_model_tensors(base, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, tensors.items())
    model = load_model(base, dtype="float32").network
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    adapter = attach(model, config_from("lora", LORA), ("up_proj",)).eval()
    assert list(adapter.deltas) == ["model.layers.0.mlp.up_proj"]
    moved(adapter.deltas["model.layers.0.mlp.up_proj"], 0.2)
    merge(adapter, base, tmp_path / "merged")
    assert far(logits(loaded(tmp_path / "merged")), logits(model)) <= 1e-5
    assert config_of(tmp_path / "merged")["tie_word_embeddings"] is True


def test_a_base_of_several_files(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(base, max_shard_size="30KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    assert len(list(base.glob("model-*.safetensors"))) > 2
    adapter = adapted(base, "all-linear")
    merge(adapter, base, tmp_path / "merged")
    assert [f.name for f in (tmp_path / "merged").glob("*safetensors*")] == ["model.safetensors"]
    assert far(logits(loaded(tmp_path / "merged")), logits(adapter.model)) <= 1e-5


HALF = [("bfloat16", 2**-8), ("float16", 2**-11)]


@pytest.mark.parametrize(("name", "step"), HALF, ids=[n for n, _ in HALF])
def test_another_dtype_is_rounded_once_and_said_in_the_config(
    tiny_model: Path, tmp_path: Path, name: str, step: float
) -> None:
    dtype = getattr(torch, name)
    adapter = adapted(tiny_model, "all-linear")
    merge(adapter, tiny_model, tmp_path / "merged", dtype=dtype)
    assert config_of(tmp_path / "merged")["dtype"] == name
    model = loaded(tmp_path / "merged")
    assert {p.dtype for p in model.parameters()} == {dtype}, "transformers loads what was written"
    for path, delta in adapter.deltas.items():
        want = delta.fold(adapter.model.get_submodule(path).weight)
        assert torch.equal(model.get_submodule(path).weight, want.detach().to(dtype))
    assert 0 < far(logits(model.float()), logits(adapter.model)) <= 10 * step


def test_a_base_in_bfloat16_keeps_its_dtype_or_is_widened(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    adapter = adapted(base, "all-linear")
    merge(adapter, base, tmp_path / "kept")
    merge(adapter, base, tmp_path / "wide", dtype=torch.float32)
    assert {e.dtype for e in open_tensors(tmp_path / "kept").values()} == {torch.bfloat16}
    assert far(logits(loaded(tmp_path / "kept").float()), logits(adapter.model)) <= 10 * 2**-8
    assert far(logits(loaded(tmp_path / "wide")), logits(adapter.model)) <= 1e-5


def test_detached_the_model_is_bit_identical(tiny_model: Path, tmp_path: Path) -> None:
    before = load_model(tiny_model, dtype="float32").network
    adapter = adapted(tiny_model, ("embed_tokens", "lm_head", "q_proj"))
    merge(adapter, tiny_model, tmp_path / "merged")
    model = adapter.detach().model
    assert torch.equal(logits(model), logits(before))
    after = model.state_dict()
    assert list(after) == list(before.state_dict())
    assert all(torch.equal(after[k], t) for k, t in before.state_dict().items())


def untouched(base: Path) -> Callable[[Path], bool]:
    """Whether a folder holds `base` as it is now, and nothing else."""
    was = {f.name: f.read_bytes() for f in base.iterdir()}
    return lambda parent: (
        {f.name: f.read_bytes() for f in base.iterdir()} == was
        and [p for p in parent.iterdir() if p.resolve() != base.resolve()] == []
    )


@pytest.mark.parametrize("layers", [("q_proj",), ("mlp",)], ids=["layer", "block"])
def test_what_cannot_be_folded_is_named_and_nothing_written(
    tiny_model: Path, tmp_path: Path, layers: tuple[str, ...]
) -> None:
    adapter = adapted(tiny_model, layers, "bottleneck")
    path = next(iter(adapter.deltas))
    with pytest.raises(NotFoldable, match=f"{path}: Bottleneck is not a change of one weight.*Nothing was written"):
        merge(adapter, tiny_model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_one_that_turns_out_unfoldable_on_the_way(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapted(tiny_model, ("q_proj",))
    last = adapter.deltas["model.layers.1.self_attn.q_proj"]

    def refuse(w: Tensor) -> Tensor:
        raise NotFoldable("this one is not")

    monkeypatch.setattr(last, "fold", refuse)
    with pytest.raises(NotFoldable, match=r"model\.layers\.1\.self_attn\.q_proj: this one is not\. Nothing was"):
        merge(adapter, tiny_model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_the_base_itself_and_a_folder_that_exists_are_refused(made_model: Callable[..., Path], tmp_path: Path) -> None:
    base = made_model(tmp_path / "base")
    adapter, whole = adapted(base, ("q_proj",)), untouched(base)
    (tmp_path / "link").symlink_to(base)
    for into in (base, tmp_path / "base" / ".." / "base", tmp_path / "link"):
        with pytest.raises(ConfigError, match="is the base model itself; merge into a new folder"):
            merge(adapter, base, into)
    (tmp_path / "link").unlink()
    assert whole(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("taken", "file", "dangling"):
        with pytest.raises(ConfigError, match=f"{name} exists already; merge into a new folder, or remove that one"):
            merge(adapter, base, tmp_path / name)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_files_that_lack_a_targets_weight(tiny_model: Path, made_model: Callable[..., Path], tmp_path: Path) -> None:
    deeper = adapted(made_model(tmp_path / "deeper", num_hidden_layers=3), ("q_proj",))
    with pytest.raises(ModelError, match=r"no model\.layers\.2\.self_attn\.q_proj\.weight.*loaded from"):
        merge(deeper, tiny_model, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["deeper"]


def test_a_full_disk_leaves_nothing_half_written(
    made_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = made_model(tmp_path / "base")
    adapter, whole = adapted(base, "all-linear"), untouched(base)
    write, calls = TensorWriter.write, []

    def full(self: TensorWriter, name: str, tensor: Tensor) -> None:
        calls.append(name)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(DiskError, match=r"the disk is full: .*free some space and run again") as caught:
        merge(adapter, base, tmp_path / "merged")
    assert f"{tmp_path / 'merged' / 'model.safetensors'} was not written" in str(caught.value)
    assert whole(tmp_path)
    monkeypatch.undo()
    merge(adapter, base, tmp_path / "merged")


MEMORY = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from veneer import machine
from veneer.adapters.attach import attach
from veneer.disk.tensors import nbytes, open_tensors, write_model_tensors
from veneer.merge.fold import merge
from veneer.methods.lora import LoRAConfig

folder = Path(sys.argv[1])
folder.mkdir()
shape = dict(vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8)
config = LlamaConfig(**shape, tie_word_embeddings=True)
config.save_pretrained(folder)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
specs = {n: (torch.float32, tuple(p.shape)) for n, p in model.named_parameters()}
write_model_tensors(folder, specs, ((n, torch.zeros(s[1])) for n, s in specs.items()))
for name, parameter in model.named_parameters():  # the fold needs no weights in memory: these take none
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(torch.zeros(1).expand(parameter.shape), False)
adapter = attach(model, LoRAConfig(rank=4, init="random")).eval()
torch.zeros(1024, 1024) @ torch.zeros(1024, 1024)  # the library's own buffers
assert machine.reset_peak_rss()
before = machine.rss_bytes()
merge(adapter, folder, folder.with_name("merged"))
stored = open_tensors(folder)
print(json.dumps({
    "grown": machine.peak_rss_bytes() - before,
    "largest": max(e.nbytes for e in stored.values()),
    "model": sum(e.nbytes for e in stored.values()),
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak of resident memory in /proc")
def test_memory_is_one_tensor_and_its_fold_not_the_model(tmp_path: Path) -> None:
    exact = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }  # freed memory goes back at once
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "base")]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=exact).stdout)
    assert found["model"] > 200e6
    assert found["grown"] < 3 * found["largest"] + 4e6 < found["model"] / 3, found  # W, B A, and their scaled sum
