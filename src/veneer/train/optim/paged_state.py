"""Optimizer state in a mapped scratch file: read ahead of each chunk's step, written and dropped behind it when memory
is short.

The numbers are those of state in memory, bit for bit: only where they lie differs.  The file has no name, so nothing
stays after a crash, and its room on the disk is taken before training.
"""

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from veneer import machine
from veneer.disk.scratch import open_scratch, refuse_memory
from veneer.errors import DiskError
from veneer.units import format_bytes

SHORT = 2**28
"""Bytes of available memory below which what was stepped is dropped at once."""
START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


class Pages:
    """One scratch file of `nbytes` in `folder`, and tensors in it.

    Raises DiskError where there is no room, or where the folder lies in memory itself.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_memory(folder, "optimizer.paged", "put the run on a disk")
        self.nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._handle = open_scratch(folder, self.nbytes)
        self._map = mmap.mmap(self._handle, self.nbytes)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._end = 0

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._handle)

    def new(self, count: int, dtype: torch.dtype) -> Tensor:
        """Zeros that begin at a page."""
        start, size = self._end, count * dtype.itemsize
        self._end = -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._end > self.nbytes:
            raise DiskError(f"a scratch file of {format_bytes(self.nbytes)} is too small for the optimizer's state")
        return self._bytes[start : start + size].view(dtype)

    def ahead(self, parts: tuple[Tensor, ...]) -> None:
        """These are needed next: let the system read them meanwhile."""
        for start, size in map(self._range, parts):
            if size:
                self._map.madvise(mmap.MADV_WILLNEED, start, size)

    def behind(self, parts: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> None:
        """`parts` were stepped now, `before` a chunk earlier: where memory is short, write the one, drop the other."""
        available = machine.available_bytes()
        if available is not None and available >= SHORT:
            return
        for start, size in map(self._range, parts):
            with suppress(AttributeError):  # not Linux: it is written when it is dropped
                offset, length = ctypes.c_int64(start), ctypes.c_int64(size)
                ctypes.CDLL(None).sync_file_range(self._handle, offset, length, START_WRITING)
        for start, size in map(self._range, before):
            if size:
                self._map.flush(start, size)
                self._map.madvise(mmap.MADV_DONTNEED, start, size)
                os.posix_fadvise(self._handle, start, size, os.POSIX_FADV_DONTNEED)

    def _range(self, part: Tensor) -> tuple[int, int]:
        """Whole pages that hold this part: offset and bytes."""
        begin = part.data_ptr() - self._bytes.data_ptr()
        start = begin // mmap.PAGESIZE * mmap.PAGESIZE
        return start, -(-(begin + part.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE - start if part.numel() else 0
