"""An adapter folder as plain data: PEFT's two files, and `veneer.json` for what PEFT has no word for.

adapter_config.json          the method's settings and targets, under PEFT's names
adapter_model.safetensors    every trained tensor, under PEFT's names
veneer.json                  base fingerprint, effective scales, training facts (only in folders written here)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.disk.atomic import replacing_folder
from veneer.errors import AdapterMismatch, did_you_mean

CONFIG, TENSORS, FACTS = "adapter_config.json", "adapter_model.safetensors", "veneer.json"


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)


def write_adapter(folder: Path, files: AdapterFiles) -> int:
    """Write the folder whole or not at all; returns its size in bytes."""
    with replacing_folder(folder) as temporary:
        (temporary / CONFIG).write_text(_json(files.config), encoding="utf-8")
        (temporary / FACTS).write_text(_json(files.facts), encoding="utf-8")
        contiguous = {k: t.detach().cpu().contiguous() for k, t in sorted(files.tensors.items())}
        save_file(contiguous, temporary / TENSORS, metadata={"format": "pt"})
    return adapter_bytes(folder)


def adapter_bytes(folder: Path) -> int:
    """Bytes of all files of the folder."""
    return sum(f.stat().st_size for f in folder.iterdir())


def read_adapter(folder: Path) -> AdapterFiles:
    """Read the folder; raises AdapterMismatch that says which file is missing or broken."""
    _check_files(folder)
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise AdapterMismatch(f"{folder / TENSORS} cannot be read ({error}); copy it again or train again") from error
    facts = _load(folder / FACTS) if (folder / FACTS).exists() else {}
    return AdapterFiles(_load(folder / CONFIG), tensors, facts)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise AdapterMismatch(f"there is no adapter folder {folder}{did_you_mean(folder.name, near)}")
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).exists()]
    if TENSORS in missing and (folder / "adapter_model.bin").exists():
        raise AdapterMismatch(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is read; veneer reads safetensors "
            f"only. Where you trust it, load it in peft and save it again with safe_serialization=True."
        )
    if missing:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        hint = f" Did you mean {folder / 'adapter'}?" if (folder / "adapter" / CONFIG).exists() else ""
        raise AdapterMismatch(f"{folder} is no adapter folder: {' and '.join(missing)} missing; found {found}.{hint}")


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterMismatch(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterMismatch(f"{path} should hold one JSON object, but holds a {type(value).__name__}")
    return value


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
