"""How fast the disk reads and writes, measured past the page cache as paged weights and checkpoints use it."""

import os
import time
from pathlib import Path

import torch

from veneer.disk.readahead import CHUNK, Range, ReadAhead
from veneer.disk.scratch import open_scratch
from veneer.train.activation_offload import ActivationFile

SAMPLE = 1 << 28
"""Bytes that are read at most."""
WRITTEN = 1 << 25
"""Bytes that are written and given back."""
AT_MOST = 16
"""Tensors."""


def read_rate(file: Path, most: int = SAMPLE) -> float:
    """Bytes a second, from the middle of a file, as `ReadAhead` reads; at most `most` of them."""
    size = file.stat().st_size
    count = min(size, most) // CHUNK or 1
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


def scratch_rates(folder: Path, nbytes: int) -> tuple[float, float]:
    """Bytes a second that are written to and read from a scratch file in `folder`, `nbytes` at a time, as paged inputs
    of blocks are.
    """
    count = min(max(2, WRITTEN // nbytes), AT_MOST)
    file, data = ActivationFile(folder, count, nbytes), torch.zeros(nbytes // 4)
    hooks = file.saving()
    try:
        began = time.perf_counter()
        kept = [hooks.pack_hook(data) for _ in range(count)]
        file.settle()
        written = time.perf_counter()
        for one in reversed(kept):
            hooks.unpack_hook(one)
        return count * nbytes / (written - began), count * nbytes / (time.perf_counter() - written)
    finally:
        file.close()
