"""Which pages are asked for, and what then comes from a real disk; the system's own count is the judge."""

import ctypes
import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from veneer.disk import prefetch
from veneer.disk.prefetch import ask_for

PAGE = mmap.PAGESIZE
linux = pytest.mark.skipif(sys.platform != "linux", reason="mincore and madvise are Linux's")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What madvise is called with."""
    calls: list[tuple[int, int, int]] = []

    class Advise:
        argtypes: Any = None

        def __call__(self, *args: int) -> int:
            calls.append(args)  # type: ignore[arg-type]
            return 0

    monkeypatch.setattr(prefetch.ctypes, "CDLL", lambda _: SimpleNamespace(madvise=Advise()))
    return calls


@linux
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("step", [10_007, 16_384, 100_000])
def test_the_pages_of_every_number_that_counts_are_asked_for(
    asked: list[tuple[int, int, int]], dtype: torch.dtype, step: int
) -> None:
    tensor = torch.zeros(1_000_003, dtype=dtype)[3:]
    ask_for(tensor, step)
    wanted = {(tensor.data_ptr() + i * tensor.itemsize) // PAGE * PAGE for i in range(0, len(tensor), step)}
    assert {at for at, _, _ in asked} == wanted
    assert len(asked) == len(range(0, len(tensor), step))
    assert {(size, advice) for _, size, advice in asked} == {(PAGE, mmap.MADV_WILLNEED)}


def test_nothing_is_asked_for_where_most_pages_are_touched(asked: list[tuple[int, int, int]]) -> None:
    ask_for(torch.zeros(100 * PAGE, dtype=torch.uint8), 2 * PAGE - 1)
    ask_for(torch.zeros(3), 1)
    ask_for(torch.zeros(100 * PAGE, device="meta"), 2 * PAGE)
    assert asked == []


def test_memory_that_is_no_file_stays_as_it_is() -> None:
    tensor = torch.arange(1_000_000)
    ask_for(tensor, 10_000)
    assert torch.equal(tensor, torch.arange(1_000_000))


def test_a_system_that_takes_no_advice_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch.ctypes, "CDLL", lambda _: SimpleNamespace())
    ask_for(torch.zeros(100 * PAGE, dtype=torch.uint8), 10 * PAGE)


def in_memory(tensor: torch.Tensor) -> int:
    """How many pages of a mapped file are in the system's cache."""
    start = tensor.data_ptr() // PAGE * PAGE
    count = -(-(tensor.data_ptr() + tensor.nbytes - start) // PAGE)
    found = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(count * PAGE), found) == 0
    return sum(byte & 1 for byte in found)


@linux
def test_only_those_pages_come_from_disk(tmp_path: Path) -> None:
    path, step = tmp_path / "codes", 16 * PAGE
    path.write_bytes(os.urandom(512 * PAGE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = torch.from_file(str(path), shared=False, size=512 * PAGE, dtype=torch.uint8)
    if in_memory(mapped):
        pytest.skip("this file system keeps its pages in memory")
    ask_for(mapped, step)
    sample = mapped[::step].clone()
    assert 32 == len(sample) <= in_memory(mapped) <= 128  # some file systems keep a few pages as one
    assert sample.tolist() == list(path.read_bytes()[::step])
