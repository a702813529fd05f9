"""Scratch files: unlinked as soon as they are open, so that a crash leaves none behind.

A process killed between the two system calls leaves an empty file; `clear_scratch` removes it at the next start.
"""

import errno
import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import DiskError
from veneer.units import format_bytes

ENDING = ".veneer-scratch"


def open_scratch(folder: Path, nbytes: int = 0, *, flags: int = 0) -> int:
    """An unlinked file in `folder`, open for reading and writing, with `nbytes` allocated on disk.

    flags   for open(2) in addition to O_RDWR, for example O_DIRECT
    Returns the descriptor; closing it frees the space.  Raises DiskError if the disk is full.
    """
    path = folder / f".{secrets.token_hex(4)}{ENDING}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o600)
        path.unlink()
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise DiskError(f"no scratch file can be created in {folder}: {error.strerror}") from error
    try:
        if nbytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        os.close(handle)
        raise DiskError(no_room(folder, nbytes, error)) from error
    return handle


def no_room(folder: Path, nbytes: int, error: OSError) -> str:
    """The message for a scratch file of `nbytes` in `folder` that failed."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"a scratch file in {folder} failed: {error.strerror}"
    room = os.statvfs(folder)
    free = format_bytes(room.f_bavail * room.f_frsize)
    return f"the disk is full: a scratch file in {folder} needs {format_bytes(nbytes)}, {free} are free"


def clear_scratch(folder: Path) -> None:
    """Remove files left by a killed process; no other process may be using `folder`."""
    for left in folder.glob(f".*{ENDING}"):
        left.unlink(missing_ok=True)


def refuse_memory(folder: Path, key: str, advice: str) -> None:
    """Raise DiskError if `folder` is in memory (tmpfs): paging to it would use memory instead of saving it.

    key      the recipe's key that asks for paging
    """
    if (kind := filesystem_of(folder)) in ("tmpfs", "ramfs"):
        raise DiskError(f"{key}: {folder} is a {kind}, which is in memory; {advice}")


def filesystem_of(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The type of the file system that holds `folder`; None if the system does not report it."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    place = folder.resolve()
    found = [(len(line[1]), line[2]) for line in lines if len(line) > 2 and place.is_relative_to(line[1])]
    return max(found, default=(0, None), key=lambda pair: pair[0])[1]


class DiskBuffer:
    """Tensors moved from memory to one memory-mapped scratch file, whose pages the system may drop."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._handle, self._end = folder, open_scratch(folder), 0

    def __enter__(self) -> "DiskBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)  # mappings stay valid while a tensor uses them

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor on disk.  Raises DiskError if the disk is full."""
        data = tensor.detach().contiguous()
        numbers: Any = data.reshape(-1).view(torch.uint8).numpy()
        flat = memoryview(numbers)
        at, done = self._end, 0
        try:
            while done < len(flat):
                done += os.pwrite(self._handle, flat[done:], at + done)
        except OSError as error:
            raise DiskError(no_room(self._folder, at + len(flat), error)) from error
        step = mmap.ALLOCATIONGRANULARITY
        self._end = -(-(at + len(flat)) // step) * step
        mapped = mmap.mmap(self._handle, len(flat), flags=mmap.MAP_PRIVATE, offset=at)
        return torch.frombuffer(mapped, dtype=data.dtype).view(data.shape)
