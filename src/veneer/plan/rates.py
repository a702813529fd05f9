"""How fast the disk reads and writes, measured past the page cache as paged weights and checkpoints use it."""

import os
import time
from pathlib import Path

from veneer.disk.readahead import CHUNK, Range, ReadAhead
from veneer.disk.scratch import open_scratch

SAMPLE = 1 << 28
"""Bytes that are read at most."""
WRITTEN = 1 << 25
"""Bytes that are written and given back."""


def read_rate(file: Path) -> float:
    """Bytes a second, from the middle of a file, as `ReadAhead` reads."""
    size = file.stat().st_size
    count = min(size, SAMPLE) // CHUNK or 1
    start = max(size - count * CHUNK, 0) // 2
    parts = [[Range(file, start + i * CHUNK, min(CHUNK, size))] for i in range(count)]
    reader = ReadAhead(parts)
    began = time.perf_counter()
    for number in range(count):
        reader.take(number, returns=False)
    return sum(r.nbytes for part in parts for r in part) / (time.perf_counter() - began)


def write_rate(folder: Path) -> float:
    """Bytes a second into a scratch file in `folder`, until they are on the disk."""
    handle, data = open_scratch(folder), os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        for _ in range(WRITTEN // len(data)):
            os.write(handle, data)
        os.fsync(handle)
        return WRITTEN / (time.perf_counter() - began)
    finally:
        os.close(handle)
