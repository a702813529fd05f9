"""Read and write safetensors files one tensor at a time; listing reads only headers.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, data_offsets), then the bytes of the tensors
without gaps (https://github.com/huggingface/safetensors#format). Headers are cached until their file changes.
`read` copies into ordinary memory: a mapped file would count twice in the process's memory while weights are converted,
and overwriting it in place would change a model in use. `map` is for weights used in their format on disk (quantized).
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from veneer.disk.atomic import replacing, write_json
from veneer.errors import DiskError, listed

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; the reference implementation's own limit
SETTLED = 1.0
"""Seconds since a file's last change before its header is cached: the clocks of file systems are coarse, so two quick
changes can have the same time."""
FEW = 4096
"""Bytes (a page); smaller tensors are read, not mapped."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Spec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor to be written."""


def nbytes(spec: Spec) -> int:
    """Bytes of a dense tensor of this dtype and shape."""
    return spec[0].itemsize * math.prod(spec[1])


@dataclass(frozen=True)
class Entry:
    """Location of one tensor."""

    file: Path
    start: int
    """Bytes from the beginning of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes((self.dtype, self.shape))


class Tensors(Mapping[str, Entry]):
    """Entries by name, of one file or all shards, in the order on disk."""

    def __init__(self, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
        self._entries = entries
        self._mapped: dict[Path, Tensor] = {}
        self.metadata = metadata

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str) -> Tensor:
        """Read the tensor into new memory.  Raises DiskError if the file is cut short."""
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            got = file.readinto(_bytes_of(tensor)) if entry.nbytes else 0
        if got != entry.nbytes:
            raise DiskError(f"{entry.file}: {name!r} has {got} of its {entry.nbytes} bytes; the file is cut short")
        return tensor

    def map(self, name: str) -> Tensor:
        """Map the tensor without a copy.  A misaligned tensor, or one smaller than a page, is read instead: a page
        fault there would read up to megabytes around it, long before they are used.

        Writing to it changes this process's memory, never the file.  The file must not be overwritten in place.
        """
        entry = self._entries[name]
        if entry.start % entry.dtype.itemsize or entry.nbytes < FEW:
            return self.read(name)
        if entry.file not in self._mapped:
            size = entry.file.stat().st_size
            self._mapped[entry.file] = torch.from_file(str(entry.file), shared=False, size=size, dtype=torch.uint8)
        part = self._mapped[entry.file][entry.start : entry.start + entry.nbytes]
        return part.view(entry.dtype).view(entry.shape)

    def without(self, names: Iterable[str]) -> "Tensors":
        """All entries except `names`."""
        gone = set(names)
        return Tensors({name: entry for name, entry in self._entries.items() if name not in gone}, self.metadata)


def open_tensors(path: Path) -> Tensors:
    """List the tensors of a .safetensors file or of a model folder (single file, or shards named by an index).

    Reads headers only.  Raises DiskError for a file that is missing, cut short or not safetensors.
    """
    files = weight_files(path) if path.is_dir() else [path]
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, notes = read_header(file)
        for name in found.keys() & entries.keys():
            raise DiskError(f"{file}: {name!r} is also in {entries[name].file.name}")
        entries |= found
        metadata |= notes
    return Tensors(entries, metadata)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, including missing shards that its index names; [] if there are none."""
    if (folder / INDEX).exists():
        try:
            names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DiskError(f"{folder / INDEX} is not a shard index: {error!r}. Fetch it again.") from error
        return [folder / name for name in sorted(set(names))]
    return [folder / SINGLE] if (folder / SINGLE).exists() else []


def read_header(file: Path) -> tuple[Mapping[str, Entry], Mapping[str, str]]:
    """Entries and metadata of one safetensors file.  Raises DiskError if its length does not match them."""
    try:
        about = file.stat()
        read = _header if time.time() - about.st_ctime > SETTLED else _header.__wrapped__
        return read(file, about.st_size, about.st_dev, about.st_ino, about.st_mtime_ns, about.st_ctime_ns)
    except FileNotFoundError as error:
        raise DiskError(f"{file} does not exist") from error


@lru_cache(maxsize=1024)
def _header(file: Path, size: int, *identity: int) -> tuple[Mapping[str, Entry], Mapping[str, str]]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise DiskError(f"{file} is cut short or not a safetensors file: {size} bytes, header of {length}")
            header = json.loads(opened.read(length))
    except ValueError as error:
        raise DiskError(f"{file} is not a safetensors file: its header is not JSON ({error})") from error
    try:
        notes = header.pop("__metadata__", None) or {}
        return MappingProxyType(_entries_of(file, header, 8 + length, size)), MappingProxyType(notes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DiskError(f"{file}: its header describes no tensors ({error!r})") from error


def _entries_of(file: Path, header: dict[str, Any], data: int, size: int) -> dict[str, Entry]:
    entries, end = {}, 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if about["dtype"] not in DTYPES:
            raise DiskError(f"{file}: {name!r} has dtype {about['dtype']}; known are {', '.join(DTYPES)}")
        start, stop = about["data_offsets"]
        entry = Entry(file, data + start, DTYPES[about["dtype"]], tuple(about["shape"]))
        if stop - start != entry.nbytes or start != end:
            raise DiskError(f"{file}: {name!r} lies at {start}:{stop}, but {end}:{end + entry.nbytes} was expected")
        entries[name], end = entry, stop
    if size != data + end:
        state = "cut short" if size < data + end else "too long"
        raise DiskError(f"{file} is {state}: {size} bytes, {data + end} expected. Fetch or write it again.")
    return entries


class TensorWriter:
    """Write a safetensors file whose header is known in advance; tensors may come in any order."""

    def __init__(self, file: BinaryIO, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> None:
        self._file = file
        self._specs = dict(specs)
        self._missing = set(specs)
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name in sorted(specs, key=lambda n: (-specs[n][0].itemsize, n)):  # widest first: every tensor is aligned
            dtype, shape = specs[name]
            end = offset + nbytes(specs[name])
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            self._starts[name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._data = 8 + len(text)
        file.truncate(self._data + offset)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.  Raises DiskError if it differs from its spec or was already written."""
        if name not in self._missing:
            raise DiskError(f"{name!r} was {'already written' if name in self._specs else 'not announced'}")
        if (tensor.dtype, tuple(tensor.shape)) != self._specs[name]:
            raise DiskError(f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, announced was {self._specs[name]}")
        self._file.seek(self._data + self._starts[name])
        self._file.write(_bytes_of(tensor.detach().cpu().contiguous()))
        self._missing.remove(name)

    def finish(self) -> None:
        """Raise DiskError, with their names, if tensors are missing."""
        if self._missing:
            names = listed(sorted(self._missing), 5, ", ")
            raise DiskError(f"{len(self._missing)} tensors were announced and not written: {names}")


@contextmanager
def writing_tensors(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """Write one safetensors file atomically; it appears when the block succeeds and all tensors were written."""
    with replacing(path) as temporary, temporary.open("r+b") as file:
        writer = TensorWriter(file, specs, metadata)
        yield writer
        writer.finish()


def write_model_tensors(
    folder: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model's weights into `folder`: one file, or shards of at most `shard_bytes` and their index.

    `tensors` may come in any order; one is in memory at a time.  Raises DiskError like `TensorWriter`.
    """
    shards = _split(specs, shard_bytes)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    home = {name: i for i, shard in enumerate(shards) for name in shard}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(writing_tensors(folder / file, shard, metadata))
            for file, shard in zip(files, shards, strict=True)
        ]
        for name, tensor in tensors:
            if name not in home:
                raise DiskError(f"{name!r} was not announced")
            writers[home[name]].write(name, tensor)
            del tensor  # before the next one is made
    if len(shards) > 1:
        total = sum(nbytes(spec) for spec in specs.values())
        weight_map = {name: files[i] for name, i in home.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(specs: Mapping[str, Spec], most: int) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + nbytes(spec) > most:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += nbytes(spec)
    return shards


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).cpu().numpy()
    return memoryview(flat)
