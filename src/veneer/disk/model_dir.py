"""Check a model folder: config.json, complete safetensors weights and a tokenizer.  All problems are listed."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.disk.tensors import INDEX, SINGLE, open_tensors, weight_files
from veneer.errors import DiskError, ModelError, listed

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json + merges.txt", "vocab.txt", "spiece.model")
"""Each is one complete set of tokenizer files."""
COPIED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*")
"""Files copied into a folder derived from another: configuration and tokenizer, not weights."""


def copy_settings(base: Path, folder: Path) -> None:
    """Copy configuration and tokenizer of a model folder, without its weights and their index."""
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.is_file() and file.name != INDEX:
                shutil.copyfile(file, folder / file.name)


@dataclass(frozen=True)
class ModelDir:
    """A complete model folder."""

    path: Path
    config: dict[str, Any]
    weights: list[Path]


def open_model_dir(folder: Path, *, tokenizer: bool = True) -> ModelDir:
    """Check a model folder and read its config; of the weights only headers and lengths are checked.

    Raises ModelError that lists the missing and damaged files and says what to do.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is {'a file' if folder.exists() else 'not there'}; a model folder was expected")
    config, problems = _read_config(folder)
    weights, broken = _check_weights(folder)
    problems += broken
    if tokenizer and not any(all((folder / name).exists() for name in way.split(" + ")) for way in TOKENIZERS):
        problems.append(f"no tokenizer: {', or '.join(TOKENIZERS)} is needed")
    if problems:
        raise ModelError(f"{folder} is not a complete model folder:\n{listed(problems, 20)}\n{_advice(folder)}")
    return ModelDir(folder, config, weights)


def _read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    file = folder / "config.json"
    if not file.exists():
        return {}, ["config.json is missing"]
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, [f"config.json is not valid JSON: {error}"]
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return {}, ["config.json has no model_type, so the architecture is unknown"]
    return config, []


def _check_weights(folder: Path) -> tuple[list[Path], list[str]]:
    try:
        files = weight_files(folder)
    except DiskError as error:
        return [], [str(error)]
    if not files:
        return [], [f"no weights: {SINGLE}, or {INDEX} and the shards it names, is needed"]
    problems = []
    for file in files:
        try:
            open_tensors(file)
        except DiskError as error:
            problems.append(str(error).removeprefix(f"{folder}/"))
    return files, problems or _check_index(folder)


def _check_index(folder: Path) -> list[str]:
    if not (folder / INDEX).exists():
        return []
    named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    try:
        found = open_tensors(folder)
    except DiskError as error:
        return [str(error)]
    lost = [f"{name} ({file})" for name, file in named.items() if name not in found or found[name].file.name != file]
    return [f"{len(lost)} tensors of {INDEX} are not in their shards: {listed(lost, 5, ', ')}"] if lost else []


def _advice(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "It holds an adapter: give the model it was trained on, and this folder as its adapter."
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return "It holds pickled weights, which can run code when loaded; convert them to safetensors first."
    if any(folder.glob("*.gguf")):
        return f"It holds a GGUF file; give that file itself: {next(iter(sorted(folder.glob('*.gguf'))))}"
    return "Fetch or write the files again."
