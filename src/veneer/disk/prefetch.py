"""Pages of a mapped file, asked for one by one before they are touched.

Touching a page that is not in memory fetches what lies around it too, as much as the disk is set to read ahead: a few
numbers from all over a large file fetch all of it.
"""

import ctypes
import mmap
from contextlib import suppress

from torch import Tensor

SPARSE = 2
"""Pages from one touch to the next from which on asking for each is less than reading on."""


def ask_for(tensor: Tensor, step: int) -> None:
    """Let the system fetch the pages of every `step`-th number of a contiguous `tensor`, and wait for none.

    Does nothing where they are most of its pages, for other memory than the CPU's, and on systems that take no such
    advice; memory that is no mapped file stays as it is.
    """
    apart = step * tensor.element_size()
    if apart < SPARSE * mmap.PAGESIZE or tensor.device.type != "cpu" or not hasattr(mmap, "MADV_WILLNEED"):
        return
    first = tensor.data_ptr()
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for address in range(first, first + tensor.nbytes, apart):
            advise(address // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE, mmap.MADV_WILLNEED)
