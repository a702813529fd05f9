"""Read parts of files ahead of their use: one thread fills a few buffers in turn.

Part i always goes to buffer i modulo their number, at the same offset, so a tensor over it remains valid; its contents
are right from `take(i)` until a later part is taken.

Files are read with O_DIRECT, which bypasses the page cache: it would fill with bytes that are used once per pass. If
the file system refuses O_DIRECT, bytes are read through the page cache and then dropped from it.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import DiskError

PAGE = 4096
"""Bytes; direct reads start and end at a multiple of it."""
CHUNK = 1 << 24
"""Bytes per read."""
BUFFERS = 3
"""One in use, two read ahead."""


@dataclass(frozen=True)
class Range:
    """Bytes of a file."""

    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Extent:
    """Whole pages of a file, and their offset `at` in a buffer."""

    file: Path
    start: int
    end: int
    """One past the last byte needed."""
    at: int

    @property
    def room(self) -> int:
        return -(-(self.end - self.start) // PAGE) * PAGE


class ReadAhead:
    """Parts, each a list of file ranges, that are used in order, forward or backward.

    parts     the ranges of each part
    buffers   parts in memory at a time
    say       receives a line about each file that is read through the page cache
    """

    def __init__(
        self, parts: Sequence[Sequence[Range]], buffers: int = BUFFERS, say: Callable[[str], None] = lambda _: None
    ) -> None:
        assert parts and all(parts) and buffers > 1
        self._parts = [list(_extents(part)) for part in parts]
        count = min(buffers, len(parts))
        size = max(part[-1].at + part[-1].room for part in self._parts)
        self._buffers = [pages(size) for _ in range(count)]
        self._memory = [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in self._buffers]
        self._files = {path: _File(path, say) for path in dict.fromkeys(e.file for part in self._parts for e in part)}
        self._reader = ThreadPoolExecutor(1, "veneer-read-ahead")
        self._held: list[int | None] = [None] * count
        self._loads: list[Future[None] | None] = [None] * count
        self._now = -1

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(len(b) for b in self._buffers)

    def view(self, part: int, wanted: Range) -> Tensor:
        """The memory of a range of this part: (nbytes,) uint8, filled after `take(part)`."""
        for e in self._parts[part]:
            if e.file == wanted.file and e.start <= wanted.start and wanted.start + wanted.nbytes <= e.end:
                at = e.at + wanted.start - e.start
                return self._memory[part % len(self._memory)][at : at + wanted.nbytes]
        raise AssertionError(f"{wanted} is not in part {part}")

    def take(self, part: int, *, returns: bool) -> None:
        """Wait until `part` is in memory, and start reading the next ones.

        returns   after the last part all follow once more in reverse order, as in a backward pass
        Raises DiskError, with the file's name, if a read failed.
        """
        if part != self._now:
            for wanted in self._ahead(part, returns):
                self._begin(wanted)
            self._now = part
        load = self._loads[part % len(self._loads)]
        assert load is not None
        load.result()

    def _ahead(self, part: int, returns: bool) -> list[int]:
        """`part` and the next ones in order of use, one per buffer."""
        up, count = part > self._now or part == 0, len(self._parts)
        if up:
            then: Iterable[int] = reversed(range(count)) if returns else range(count)
            order = chain(range(part, count), then)
        else:
            order = chain(range(part, -1, -1), range(count))
        taken: dict[int, int] = {}
        for other in order:
            taken.setdefault(other % len(self._held), other)
            if len(taken) == len(self._held):
                break
        return list(taken.values())

    def _begin(self, part: int) -> None:
        at = part % len(self._held)
        if self._held[at] == part:
            return
        before = self._loads[at]
        if before is not None:
            before.cancel()
        torch.autograd.graph.increment_version(self._memory[at])  # backward fails if it still needs the old bytes
        self._held[at] = part
        self._loads[at] = self._reader.submit(_read, self._parts[part], self._buffers[at], self._files)


def pages(nbytes: int) -> mmap.mmap:
    """Anonymous private memory, aligned to a page as direct reads and writes require."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, nbytes)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class _File:
    """A file open for reads of whole pages; it must not change meanwhile."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = path, say
        direct = getattr(os, "O_DIRECT", 0)
        try:
            self.handle = os.open(path, os.O_RDONLY | direct)
            self.direct = bool(direct)
        except OSError:
            self._open_cached()
        self._as_it_was = self._state()

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    def read(self, into: memoryview, start: int, needed: int) -> None:
        """Fill whole pages from `start`; the file must have at least `needed` bytes of them."""
        done = 0
        while done < needed:
            try:
                got = os.preadv(self.handle, [into[done : done + CHUNK]], start + done)
            except OSError as error:
                if not self.direct:
                    raise DiskError(f"{self.path} cannot be read: {error.strerror}") from error
                os.close(self.handle)
                self._open_cached()
                continue
            if got <= 0:
                break
            done += got
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handle, start, len(into), os.POSIX_FADV_DONTNEED)
        if done < needed:
            raise DiskError(f"{self.path} is cut short: {self._state()[0]} bytes, {start + needed} are needed")
        if self._state() != self._as_it_was:
            raise DiskError(f"{self.path} was changed while it was in use; put the old file back and run again")

    def _open_cached(self) -> None:
        self.direct = False
        try:
            self.handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be read: {error.strerror}") from error
        self._say(f"{self.path} is read through the page cache: its file system refuses direct reads")

    def _state(self) -> tuple[int, int]:
        about = os.fstat(self.handle)
        return about.st_size, about.st_mtime_ns


def _extents(part: Sequence[Range]) -> Iterator[_Extent]:
    """Whole pages around the ranges; adjacent ones are merged."""
    at = 0
    open_: tuple[Path, int, int] | None = None
    for r in sorted(part, key=lambda r: (str(r.file), r.start)):
        start, end = r.start // PAGE * PAGE, r.start + r.nbytes
        if open_ is not None and open_[0] == r.file and start <= -(-open_[2] // PAGE) * PAGE:
            open_ = (r.file, open_[1], max(open_[2], end))
            continue
        if open_ is not None:
            yield (made := _Extent(*open_, at))
            at += made.room
        open_ = (r.file, start, end)
    assert open_ is not None
    yield _Extent(*open_, at)


def _read(part: Sequence[_Extent], buffer: mmap.mmap, files: dict[Path, _File]) -> None:
    for e in part:
        files[e.file].read(memoryview(buffer)[e.at : e.at + e.room], e.start, e.end - e.start)
