"""A folder of ours in transformers and bitsandbytes, a folder of theirs here: equal codes, equal logits.

bitsandbytes 0.50.2 dequantizes rows that are no multiple of the block wrongly on a CPU, and takes another path, in
bfloat16, where no gradient is asked for: so the model is 64 wide, and its outputs are compared with gradients on.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.adapters.told import Told
from veneer.base.load import load_model
from veneer.base.quant_cache import (
    cache_folder,
    cache_quantized,
    check_cached,
    content_hash,
    is_quantized,
    quantize_weights,
    write_quantized,
)
from veneer.base.quantize import Quantizer
from veneer.base.storage_config import base_storage
from veneer.errors import DiskError
from veneer.kernels import native

IDS = torch.arange(40)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, made_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "base"
    return made_model(folder, hidden_size=64, intermediate_size=128, tied=False, attention_bias=True)


def written(base: Path, into: Path, storage: Any) -> Quantizer:
    made = Quantizer(base_storage(storage))
    quantize_weights(base, made)
    write_quantized(base, into, made)
    return made


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits.detach()
    return out


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to the bit; the scalar kernels add up in another order than dense products, which float32 shows."""
    if native.status().isa == "scalar":
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "storage",
    ["nf4", "fp4", {"name": "nf4", "block": 32, "double_quant": False}, {"name": "nf4", "head": True}],
    ids=str,
)
def test_transformers_and_bitsandbytes_load_our_folder(wide: Path, tmp_path: Path, storage: Any) -> None:
    made = written(wide, tmp_path / "q", storage)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    ours = load_model(tmp_path / "q", storage=None, dtype="float32").network
    kinds = {path: type(theirs.get_submodule(path)).__name__ for path in [*made.kept, "lm_head"]}
    head = base_storage(storage).head  # type: ignore[union-attr]
    assert kinds == dict.fromkeys([*made.kept], "Linear4bit") | {"lm_head": "Linear4bit" if head else "Linear"}
    assert_same(logits(ours), logits(theirs))


@pytest.mark.filterwarnings("ignore")
def test_transformers_and_bitsandbytes_load_our_int8_folder(wide: Path, tmp_path: Path) -> None:
    """LLM.int8() rounds inputs to 8 bits too, so outputs are near and weights equal."""
    made = written(wide, tmp_path / "q", "int8")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    for path, kept in made.kept.items():
        module = theirs.get_submodule(path)
        assert torch.equal(module.weight.CB if module.weight.CB is not None else module.weight, kept.codes)
        assert torch.equal(module.weight.SCB, kept.absmax)
    ours = logits(load_model(tmp_path / "q", storage=None, dtype="float32").network)
    assert float((logits(theirs) - ours).norm() / ours.norm()) < 0.05


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "down_proj"]},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    ],
    ids=str,
)
def test_we_load_theirs(wide: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    theirs: Any = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, dtype=torch.float32)
    folder = tmp_path / "theirs"
    shutil.copytree(wide, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    theirs.save_pretrained(folder)
    ours = load_model(folder, storage=None, dtype="float32").network
    dense = {path for path, m in ours.named_modules() if type(m) is torch.nn.Linear}
    assert dense == {p for p, m in theirs.named_modules() if type(m) is torch.nn.Linear}
    assert_same(logits(ours), logits(theirs))


@pytest.mark.filterwarnings("ignore")
def test_ours_and_theirs_are_one_base(wide: Path, tmp_path: Path) -> None:
    from veneer.base.fingerprint import base_fingerprint

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs: Any = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, dtype=torch.float32)
    folder = tmp_path / "theirs"
    shutil.copytree(wide, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    theirs.save_pretrained(folder)
    one = load_model(folder, storage=None, dtype="float32").network
    other = load_model(wide, storage=base_storage("nf4"), dtype="bfloat16").network
    assert base_fingerprint(one) == base_fingerprint(other)


def test_what_is_written_besides_weights(wide: Path, tmp_path: Path) -> None:
    written(wide, tmp_path / "q", "nf4")
    assert is_quantized(tmp_path / "q") and not is_quantized(wide)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    about = config.pop("quantization_config")
    assert config == json.loads((wide / "config.json").read_text())
    assert about["llm_int8_skip_modules"] == ["lm_head"]
    assert BitsAndBytesConfig(**{k: v for k, v in about.items() if k != "quant_method"}).load_in_4bit
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (wide / name).read_bytes()


def test_nothing_is_left_of_a_failed_write(wide: Path, tmp_path: Path) -> None:
    made = Quantizer(base_storage("nf4"))
    quantize_weights(wide, made)

    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match="the disk is full"):
        write_quantized(wide, tmp_path / "q", made, full)
    assert [p.name for p in tmp_path.iterdir() if "q" in p.name] == []


def test_the_hash_is_of_contents(wide: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(wide, one)
    shutil.copytree(wide, other)
    nf4 = base_storage("nf4")
    assert nf4 is not None
    assert content_hash(one) == content_hash(other)
    assert cache_folder(one, nf4) == cache_folder(other, nf4)
    before = content_hash(one)
    (one / "tokenizer_config.json").write_text("{}")
    assert content_hash(one) != before
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert content_hash(other) != before


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash that cannot be kept is computed, and the model is quantized at each start."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "model.safetensors").write_bytes(b"x" * (2 << 20))
    assert content_hash(tmp_path) == content_hash(tmp_path)
    told = Told()
    load_model(wide, storage=base_storage("nf4"), dtype="float32", say=told.append)
    assert told[1].startswith("the quantized weights are not kept for the next start")


def test_a_large_files_hash_is_kept_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.base import quant_cache

    big = tmp_path / "model.safetensors"
    big.write_bytes(b"x" * (2 << 20))
    first = content_hash(tmp_path)
    read: list[Any] = []
    real = hashlib.file_digest
    monkeypatch.setattr(quant_cache.hashlib, "file_digest", lambda *a: read.append(a) or real(*a))
    assert content_hash(tmp_path) == first
    assert read == []
    big.write_bytes(b"y" * (2 << 20))
    assert content_hash(tmp_path) != first
    assert len(read) == 1


def test_a_large_file_with_its_old_date_but_other_bytes_is_hashed_again(tmp_path: Path) -> None:
    big = tmp_path / "model.safetensors"
    big.write_bytes(b"x" * (2 << 20))
    before, first = big.stat(), content_hash(tmp_path)
    time.sleep(0.02)  # the clock of file systems ticks every few milliseconds
    with big.open("r+b") as opened:
        opened.write(b"y")
    os.utime(big, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = big.stat()
    assert (now.st_size, now.st_ino, now.st_mtime_ns) == (before.st_size, before.st_ino, before.st_mtime_ns)
    assert content_hash(tmp_path) != first


def test_a_kept_hash_that_is_no_text_is_computed_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * (2 << 20))
    first = content_hash(tmp_path)
    (kept,) = (tmp_path / "cache" / "quantized" / "hashes").iterdir()
    kept.write_bytes(b"\xff" * 64)
    assert content_hash(tmp_path) == first


def test_what_was_cached_is_not_read_again_to_be_checked(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder takes its place after it was hashed: the hashes are kept for that place."""
    from veneer.base import quant_cache

    monkeypatch.setattr(quant_cache, "LARGE", 0)
    made = Quantizer(base_storage("nf4"))
    quantize_weights(wide, made)
    hashed: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(quant_cache.hashlib, "file_digest", lambda f, how: hashed.append(f.name) or real(f, how))
    cache_quantized(wide, tmp_path / "q", made)
    assert sum(name.endswith("model.safetensors") for name in hashed) == 1
    hashed.clear()
    check_cached(tmp_path / "q")
    assert hashed == []
    time.sleep(0.02)
    (tmp_path / "q" / "config.json").touch()
    check_cached(tmp_path / "q")
    assert [Path(name).name for name in hashed] == ["config.json"]


def test_a_cached_folder_that_lacks_a_file_is_not_whole(wide: Path, tmp_path: Path) -> None:
    made = Quantizer(base_storage("nf4"))
    quantize_weights(wide, made)
    cache_quantized(wide, tmp_path / "q", made)
    check_cached(tmp_path / "q")
    for name in ("tokenizer.json", "model.safetensors"):
        gone = tmp_path / "q" / name
        data = gone.read_bytes()
        gone.unlink()
        with pytest.raises(DiskError, match=r"q does not hold what was written"):
            check_cached(tmp_path / "q")
        gone.write_bytes(data)
    (tmp_path / "q" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DiskError, match="is not a shard index"):
        check_cached(tmp_path / "q")
