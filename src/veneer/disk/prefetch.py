"""Prefetch single pages of a memory-mapped file.

A page fault also reads the pages around it, as far as the disk's read-ahead goes: reading a few scattered numbers of a
large file reads all of it. Requesting each page first avoids that.
"""

import ctypes
import mmap
from contextlib import suppress

from torch import Tensor

SPARSE = 2
"""Distance in pages from which requesting single pages reads less than the disk's read-ahead."""


def ask_for(tensor: Tensor, step: int) -> None:
    """Request the pages of every `step`-th number of a contiguous `tensor`, without waiting for them.

    Does nothing if these are most of its pages, if it is not on the CPU, or if the system has no madvise; memory that
    is not a mapped file is not affected.
    """
    apart = step * tensor.element_size()
    if apart < SPARSE * mmap.PAGESIZE or not tensor.is_cpu or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first = tensor.data_ptr()
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for address in range(first, first + tensor.nbytes, apart):
            advise(address // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE, mmap.MADV_WILLNEED)
