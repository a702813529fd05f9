"""Read and write an adapter folder as plain data: PEFT's two files, and `veneer.json` with what PEFT does not store.

adapter_config.json          the method's settings and targets, under PEFT's names
adapter_model.safetensors    every trained tensor, under PEFT's names
veneer.json                  base fingerprint, effective scales, training facts, and the sha256 of the tensor file to
                             detect damage; folders written by PEFT have no such file

A folder with parts holds one such folder per part, and a `veneer.json` with the sha256 of each part's tensor file.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from veneer.disk.atomic import json_text, replacing_folder
from veneer.disk.tensors import writing_tensors
from veneer.errors import AdapterMismatch, did_you_mean

CONFIG, TENSORS, FACTS = "adapter_config.json", "adapter_model.safetensors", "veneer.json"
SHA256, PARTS = "tensors_sha256", "parts"


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter folder."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)
    save_beside: Callable[[Path], object] | None = None
    """Writes further files (a tokenizer) into the folder."""


def write_adapter(folder: Path, files: AdapterFiles) -> int:
    """Write the folder atomically; returns its size in bytes."""
    with replacing_folder(folder) as temporary:
        _write(temporary, files)
    return adapter_bytes(folder)


def write_parts(folder: Path, parts: Mapping[str, AdapterFiles], facts: Mapping[str, Any]) -> int:
    """Write a folder with several adapters, each in a subfolder, atomically; returns its size in bytes."""
    with replacing_folder(folder) as temporary:
        hashes = {}
        for name, files in parts.items():
            (temporary / name).mkdir()
            hashes[name] = _write(temporary / name, files)
        (temporary / FACTS).write_text(json_text({"format": 1, PARTS: hashes, **facts}), encoding="utf-8")
    return adapter_bytes(folder)


def _write(folder: Path, files: AdapterFiles) -> str:
    """Write the three files; returns the sha256 of the tensor file."""
    _save(files.tensors, folder / TENSORS)
    written = _sha256(folder / TENSORS)
    (folder / CONFIG).write_text(json_text(files.config), encoding="utf-8")
    (folder / FACTS).write_text(json_text({**files.facts, SHA256: written}), encoding="utf-8")
    if files.save_beside is not None:
        files.save_beside(folder)
    return written


def adapter_bytes(folder: Path) -> int:
    """Total size of the folder's files in bytes."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def parts_of(folder: Path) -> list[Path]:
    """The subfolders of a folder with parts, in order; [] for any other folder.

    Raises AdapterMismatch if a part is missing or was not trained together with the others.
    """
    if (folder / CONFIG).exists() or not (folder / FACTS).is_file():
        return []
    facts = _load(folder / FACTS)
    if PARTS not in facts:
        return []
    hashes = facts[PARTS]
    if not isinstance(hashes, dict) or not all(Path(name).name == name for name in hashes):
        raise AdapterMismatch(
            f"{folder / FACTS} should name the folders of its parts, but says {hashes!r}; copy it again"
        )
    for name, trained in hashes.items():
        _check_files(folder / name)
        if trained != _sha256(folder / name / TENSORS):
            raise AdapterMismatch(
                f"{folder / name / TENSORS} is not the file that the other parts of {folder} were trained with; copy "
                f"the folder again, or load {folder / name} alone"
            )
    return [folder / name for name in hashes]


def read_facts(folder: Path) -> dict[str, Any]:
    """The contents of veneer.json, of an adapter folder or one with parts; raises like `read_adapter`."""
    if not parts_of(folder):
        _check_files(folder)
    facts = _load(folder / FACTS) if (folder / FACTS).exists() else {}
    return {key: value for key, value in facts.items() if key != SHA256}


def read_adapter(folder: Path) -> AdapterFiles:
    """Read the folder.  Raises AdapterMismatch, with the file's name, if one is missing or damaged."""
    _check_files(folder)
    config = _load(folder / CONFIG)
    facts = _load(folder / FACTS) if (folder / FACTS).exists() else {}
    try:
        written = facts.pop(SHA256, None)
        if written is not None and written != _sha256(folder / TENSORS):
            raise AdapterMismatch(
                f"{folder / TENSORS} is not the file that {FACTS} was written with: it was damaged or changed. "
                f"Copy the folder again, or delete {FACTS} if it was changed on purpose."
            )
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise AdapterMismatch(f"{folder / TENSORS} cannot be read ({error}); copy it again or train again") from error
    return AdapterFiles(config, tensors, facts)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the tensors one at a time, sorted by name, without copying all of them."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with writing_tensors(path, specs) as writer:
        for name, tensor in sorted(tensors.items()):
            writer.write(name, tensor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: Path) -> None:
    if folder.is_file():
        raise AdapterMismatch(f"{folder} is a file; an adapter is a folder that holds {CONFIG} and {TENSORS}")
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise AdapterMismatch(f"there is no adapter folder {folder}{did_you_mean(folder.name, near)}")
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if TENSORS in missing and (folder / "adapter_model.bin").exists():
        raise AdapterMismatch(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is read; veneer reads safetensors "
            f"only. If you trust it, load it in peft and save it again with safe_serialization=True."
        )
    if missing:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        hint = f" Did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).exists() else ""
        raise AdapterMismatch(
            f"{folder} is not an adapter folder: {' and '.join(missing)} missing; found {found}.{hint}"
        )


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterMismatch(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise AdapterMismatch(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise AdapterMismatch(f"{path} should hold one JSON object, but holds a {type(value).__name__}")
    return value
