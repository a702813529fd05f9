"""Inputs of recomputed blocks kept in a scratch file from the forward pass to the backward pass.

One thread writes each as it comes and reads it back one block ahead of its use, in the reverse order.  Those of a base
on an accelerator go to host memory instead.
"""

import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from veneer.base.base import Base
from veneer.base.device import Device
from veneer.data.example import Example
from veneer.disk.readahead import PAGE, pages
from veneer.disk.scratch import no_room, open_scratch, refuse_memory
from veneer.errors import DiskError
from veneer.tasks.causal_lm import ROUND
from veneer.train.job import BatchPlan, Job

BEHIND = 2
"""Tensors that may wait to be written."""


class Inputs(Protocol):
    """Where inputs of blocks are kept."""

    def saving(self) -> saved_tensors_hooks:
        """Inside, tensors that autograd saves are kept there."""


@dataclass(frozen=True)
class HostMemory:
    """The inputs of a base on an accelerator, kept in the memory of the CPU."""

    device: Device

    def saving(self) -> saved_tensors_hooks:
        return self.device.offloading()


class Kept:
    """A tensor in the file; its place is free again when nobody refers to this."""

    def __init__(self, home: "ActivationFile", place: int, tensor: Tensor) -> None:
        self._free, self.place, self.shape, self.dtype = home.free, place, tensor.shape, tensor.dtype
        self.nbytes = tensor.nbytes
        self.read: Future[mmap.mmap] | None = None

    def __del__(self) -> None:
        self._free.append(self.place)


class ActivationFile:
    """Room for `places` tensors of at most `most` bytes each, in a scratch file in `folder`.

    Raises DiskError where the disk has no room for all of them, at once.
    """

    def __init__(self, folder: Path, places: int, most: int) -> None:
        self._folder, self._room = folder, -(-most // PAGE) * PAGE
        self.nbytes = places * self._room
        self.free = list(range(places))
        try:
            self._handle = open_scratch(folder, self.nbytes, flags=getattr(os, "O_DIRECT", 0))
        except DiskError:  # a file system without direct access, or a full disk, which is said again
            self._handle = open_scratch(folder, self.nbytes)
        self._worker = ThreadPoolExecutor(1, "veneer-activations")
        self._writing: deque[Future[None]] = deque()
        self._order: list[Kept] = []
        self.stored = 0
        """Tensors written so far."""

    def close(self) -> None:
        """Wait for pending writes and free the disk."""
        self._worker.shutdown(cancel_futures=True)
        os.close(self._handle)

    def saving(self) -> saved_tensors_hooks:
        """Inside, tensors that autograd saves go to the file."""
        return saved_tensors_hooks(self._put, self._get)

    def settle(self) -> None:
        """Wait until all that was saved is written."""
        while self._writing:
            self._writing.popleft().result()

    def _put(self, tensor: Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.nbytes > self._room or not self.free:
            return tensor
        kept = Kept(self, self.free.pop(), tensor)
        while len(self._writing) >= BEHIND:
            self._writing.popleft().result()
        self._writing.append(self._worker.submit(self._write, kept.place, tensor.detach()))
        self._order.append(kept)
        self.stored += 1
        return kept

    def _get(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.settle()
        read = kept.read or self._worker.submit(self._read, kept.place)
        while self._order and self._order.pop() is not kept:
            pass
        if self._order:
            below = self._order[-1]
            below.read = below.read or self._worker.submit(self._read, below.place)
        buffer, kept.read = read.result(), None
        flat = torch.frombuffer(buffer, dtype=torch.uint8)[: kept.nbytes]
        return flat.view(kept.dtype).view(kept.shape)

    def _write(self, place: int, tensor: Tensor) -> None:
        buffer = pages(self._room)
        target = torch.frombuffer(buffer, dtype=torch.uint8)[: tensor.nbytes]
        target.copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
        self._all(os.pwritev, buffer, place)

    def _read(self, place: int) -> mmap.mmap:
        buffer = pages(self._room)
        self._all(os.preadv, buffer, place)
        return buffer

    def _all(self, move: Any, buffer: mmap.mmap, place: int) -> None:
        done = 0
        try:
            while done < self._room:
                moved = move(self._handle, [memoryview(buffer)[done:]], place * self._room + done)
                if not moved:
                    raise DiskError(f"the scratch file in {self._folder} ends early")
                done += moved
        except OSError as error:
            if isinstance(error, DiskError):
                raise
            raise DiskError(no_room(self._folder, self._room, error)) from error


@contextmanager
def paged_inputs(job: Job, base: Base, folder: Path) -> Iterator[Inputs | None]:
    """Where `memory.page_activations` keeps them: a scratch file, an accelerator's in host memory; else None."""
    if not job.recipe.memory.page_activations:
        yield None
    elif not base.device.is_cpu:
        yield HostMemory(base.device)
    else:
        refuse_memory(folder, "memory.page_activations", "put the run on a disk")
        file = ActivationFile(folder, len(base.blocks), largest_input(base, job.examples, job.steps))
        try:
            yield file
        finally:
            file.close()


def largest_input(base: Base, examples: Sequence[Example], steps: BatchPlan) -> int:
    """Bytes of a block's input in the micro-batch of the most tokens, filled up as packed ones are."""
    longest = max(sum(len(examples[i]) for i in members) for step in steps for members in step)
    rows = -(-longest // ROUND) * ROUND
    return int(rows * base.hidden_size * base.dtype.itemsize)
