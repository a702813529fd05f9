"""A quantized model as a folder that transformers and bitsandbytes load, and veneer's cache of such folders."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import machine
from veneer.base.fill import match, rearranged_by_transformers
from veneer.base.quantize import Quantizer
from veneer.base.storage_config import BaseStorage
from veneer.disk.atomic import clear_leftovers, replacing, replacing_folder
from veneer.disk.model_dir import COPIED, copy_settings, open_model_dir
from veneer.disk.scratch import DiskBuffer
from veneer.disk.tensors import Tensors, open_tensors, weight_files, write_model_tensors
from veneer.errors import DiskError, ModelError
from veneer.models.skeleton import build_skeleton, quiet
from veneer.storage import Storage, bnb
from veneer.storage.fourbit import FourBit

FORMAT = 1
"""Raised when cached folders change, so that older ones are not used."""
SEAL = "content.sha256"
"""The file in a cached folder that holds its content's hash."""
LARGE = 1 << 20
"""Bytes; smaller files are hashed faster than looked up."""


def is_quantized(folder: Path) -> bool:
    """Whether config.json says, or the names in the files show, that the weights are quantized."""
    if open_model_dir(folder).config.get("quantization_config") is not None:
        return True
    return any(name.endswith((".weight.quant_map", ".SCB")) for name in open_tensors(folder))


def cache_folder(base: Path, storage: BaseStorage) -> Path:
    """Where `base`, kept in `storage`, is kept for the next start, whether or not it is there."""
    key = json.dumps([FORMAT, content_hash(base), storage.settings], sort_keys=True)
    return machine.cache_dir() / "quantized" / hashlib.sha256(key.encode()).hexdigest()


def content_hash(folder: Path, home: Path | None = None) -> str:
    """sha256 over names and contents of the files that make a model: weights, configuration, tokenizer.

    home   where the folder will be, if it is about to be renamed
    A large file's own hash is kept in the cache under its path, size, inode and times of change, and read from there
    while these are the same.  The time of its last change of any kind is among them, which no program can set: a file
    that was overwritten in place and given its old date is another.
    """
    names = {p.name for pattern in COPIED for p in folder.glob(pattern)} | {p.name for p in weight_files(folder)}
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {_file_hash(folder / name, (home or folder) / name)}\n".encode())
    return digest.hexdigest()


def _file_hash(file: Path, home: Path) -> str:
    about = file.stat()
    times = f"{about.st_mtime_ns} {about.st_ctime_ns}"
    identity = f"{home.resolve()} {about.st_size} {about.st_ino} {times}"
    kept = machine.cache_dir() / "quantized" / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    try:
        return kept.read_text(encoding="ascii")
    except (OSError, ValueError):
        pass
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if about.st_size > LARGE:
        with suppress(DiskError), replacing(kept) as temporary:  # where it cannot be kept, it is computed each time
            temporary.write_text(found, encoding="ascii")
    return found


def check_cached(folder: Path) -> None:
    """Raise DiskError for a cached folder that is not as it was written; only files that have changed are read."""
    try:
        sealed = (folder / SEAL).read_text(encoding="ascii")
        found = content_hash(folder)
    except (OSError, ValueError) as error:
        raise DiskError(f"{folder} is not whole: {error}") from error
    if found != sealed:
        raise DiskError(f"{folder} does not hold what was written: its content's hash is not the one in {SEAL}")


def sealed_copy(base: Path, storage: BaseStorage, say: Callable[[str], None]) -> tuple[Path, bool]:
    """Where the copy of `base` in `storage` is kept, and whether it is there, as it was written.

    Leftovers of killed processes are removed where it is to be made.
    """
    cached = cache_folder(base, storage)
    if cached.is_dir():
        try:
            check_cached(cached)
            return cached, True
        except DiskError as error:
            say(f"the quantized weights in {cached} are damaged and made anew: {error}")
    clear_leftovers(cached.parent)
    return cached, False


def quantize_weights(base: Path, quantizer: Quantizer) -> None:
    """Quantize the weights of a folder and load nothing else.

    Raises ModelError for files that do not fit config.json, and where transformers rearranges them (merged experts).
    """
    with quiet():
        network = build_skeleton(base, torch.bfloat16)
    try:
        match(network, quantizer(network, open_tensors(base)))
    except ModelError:
        if not rearranged_by_transformers(network):
            raise
        quantizer.homes = {}


def quantize_into_cache(base: Path, into: Path, storage: BaseStorage) -> bool:
    """Quantize `base` into the cache, each weight written to disk as soon as it is done; whether that can be."""
    with DiskBuffer(into.parent) as spill:
        quantizer = Quantizer(storage, spill=spill)
        quantize_weights(base, quantizer)
        if quantizer.homes:
            cache_quantized(base, into, quantizer)
    return bool(quantizer.homes)


def write_quantized(
    base: Path, into: Path, made: Quantizer, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Write `base` with some weights quantized, whole or not at all; returns the folder's bytes.

    progress    is told how many tensors of how many are written
    Memory is one tensor beside what is kept.  Raises DiskError.
    """
    with replacing_folder(into) as folder:
        _write(base, folder, made, progress)
    return sum(file.stat().st_size for file in into.iterdir())


def cache_quantized(base: Path, into: Path, made: Quantizer) -> None:
    """Write what `write_quantized` does, and a hash of it that `check_cached` compares.  Raises DiskError."""
    with replacing_folder(into) as folder:
        _write(base, folder, made, lambda done, total: None)
        (folder / SEAL).write_text(content_hash(folder, into), encoding="ascii")


def _write(base: Path, folder: Path, made: Quantizer, progress: Callable[[int, int], None]) -> None:
    stored = open_tensors(base).without(made.copies)
    kept = {home: made.kept[path] for path, home in made.homes.items()}
    specs = {}
    for name, entry in stored.items():
        if name not in kept:
            specs[name] = (entry.dtype, entry.shape)
            continue
        for key, tensor in kept[name].tensors(name).items():
            specs[key] = (tensor.dtype, tuple(tensor.shape))
    copy_settings(base, folder)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(next(iter(kept.values())), made.dense, config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_model_tensors(folder, specs, _tensors(stored, kept, progress))


def misread_on_cpu(made: Quantizer) -> list[str]:
    """Paths of layers whose 4-bit weights bitsandbytes computes with wrongly on a CPU with AVX-512."""
    four = {path: kept for path, kept in made.kept.items() if isinstance(kept, FourBit)}
    return [path for path, kept in four.items() if bnb.misread_on_cpu(kept.shape, kept.block)]


def _tensors(
    stored: Tensors, kept: Mapping[str, Storage], progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Tensor]]:
    for done, name in enumerate(stored, start=1):
        yield from kept[name].tensors(name).items() if name in kept else [(name, stored.read(name))]
        progress(done, len(stored))


def quantization_config(one: Storage, dense: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers needs to read weights kept as `one` is; `config` is the model's config.json."""
    kind: str | None = getattr(one, "quant_type", None)
    four = kind is not None
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "_load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": kind or "fp4",
        "bnb_4bit_use_double_quant": bool(getattr(one, "double_quant", False)),
        "bnb_4bit_compute_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(dense),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
