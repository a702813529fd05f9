"""Scratch files: room is taken at once, nothing stays, and spilled tensors are the same numbers."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from veneer.disk.scratch import ENDING, DiskBuffer, clear_scratch, filesystem_of, open_scratch, refuse_memory
from veneer.errors import DiskError


def test_a_scratch_file_has_room_and_no_name(tmp_path: Path) -> None:
    handle = open_scratch(tmp_path / "new", 10_000)
    assert os.fstat(handle).st_size == 10_000 and os.fstat(handle).st_nlink == 0
    assert list((tmp_path / "new").iterdir()) == []
    os.close(handle)


def test_a_full_disk_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        DiskError, match=r"the disk is full: a scratch file in .* needs 1048576 TiB, .* are free|failed"
    ):
        open_scratch(tmp_path, 1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_no_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="no scratch file can be created"):
        open_scratch(tmp_path / "file")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".0123{ENDING}").write_bytes(b"x")
    (tmp_path / "recipe.yaml").write_text("kept")
    clear_scratch(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_file_system_of_a_folder_that_need_not_be_there(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n")
    assert filesystem_of(tmp_path / "new", mounts) == "tmpfs"
    assert filesystem_of(Path("/"), mounts) == "ext4"
    assert filesystem_of(tmp_path, tmp_path / "absent") is None


def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_memory(Path("/proc"), "memory.page_weights", "put it on a disk")
    monkeypatch.setattr("veneer.disk.scratch.filesystem_of", lambda folder: "ramfs")
    with pytest.raises(DiskError, match=r"memory.page_weights: .* is a ramfs, which is in memory; put it on a disk"):
        refuse_memory(tmp_path, "memory.page_weights", "put it on a disk")


def test_spilled_tensors_are_equal_and_outlive_the_file(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 5000, generator=rng), torch.arange(7, dtype=torch.uint8), torch.ones(1).bfloat16()]
    with DiskBuffer(tmp_path) as buffer:
        back = [buffer.put(t) for t in tensors]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, back, strict=True))
    assert not {a.data_ptr() for a in tensors} & {b.data_ptr() for b in back}


def test_spilling_to_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    wanted = re.escape(f"the disk is full: a scratch file in {tmp_path} needs 40 B")
    with DiskBuffer(tmp_path) as buffer, pytest.raises(DiskError, match=wanted):
        buffer.put(torch.zeros(10))
