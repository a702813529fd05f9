"""Read ahead: every part is whole when taken, in any order; what cannot be read is named; old bytes are not used."""

import os
import random
import threading
from pathlib import Path

import pytest
import torch

from veneer.disk import readahead
from veneer.disk.readahead import PAGE, Range, ReadAhead
from veneer.errors import DiskError

RNG = random.Random(0)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        path.write_bytes(RNG.randbytes(50_001))
    return paths


def parts_of(files: list[Path], count: int = 7) -> list[list[Range]]:
    """Ranges at odd places: neighbours, far apart, over both files, up to the last byte."""
    a, b = files
    made = [[Range(a, 7 * 1000 * i + 13, 900), Range(a, 7 * 1000 * i + 913, 5000), Range(b, 300 * i, 77)]
            for i in range(count)]  # fmt: skip
    made[3].append(Range(b, 50_000, 1))
    made[4].append(Range(b, 30_000, 12_345))
    return made


def check(reader: ReadAhead, parts: list[list[Range]], number: int) -> None:
    for r in parts[number]:
        assert bytes(reader.view(number, r).tolist()) == r.file.read_bytes()[r.start : r.start + r.nbytes]


@pytest.mark.parametrize("buffers", [2, 3, 20])
def test_every_part_in_every_order(files: list[Path], buffers: int) -> None:
    parts = parts_of(files)
    reader = ReadAhead(parts, buffers)
    passes = [*range(7), *reversed(range(7))]
    anywhere = RNG.choices(range(7), k=40)
    for order, returns in ((passes + passes, True), ([*range(7)] * 2, False), (anywhere, True)):
        for number in order:
            reader.take(number, returns=returns)
            check(reader, parts, number)
    assert reader.nbytes <= min(buffers, 7) * 6 * PAGE + 20 * PAGE


def test_each_part_is_read_once_a_pass_and_ahead(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    parts = parts_of(files)
    real = readahead._read

    def counting(part, buffer, opened):  # type: ignore[no-untyped-def]
        reads.append(next(i for i, p in enumerate(reader._parts) if p is part))
        real(part, buffer, opened)

    monkeypatch.setattr(readahead, "_read", counting)
    reader = ReadAhead(parts, 3)
    for number in [*range(7), *reversed(range(7)), *range(7)]:
        reader.take(number, returns=True)
    reader._reader.shutdown()
    assert reads[:7] == list(range(7))  # forward
    assert reads[7:11] == [3, 2, 1, 0]  # 6, 5 and 4 were still there
    assert reads[11:] == [3, 4, 5, 6]  # 0, 1 and 2 were
    assert reader._held == [6, 4, 5]


def test_buffers_are_the_process_s_own_memory() -> None:
    before = _own()
    buffer = readahead.pages(64 << 20)
    buffer[::PAGE] = bytes(len(buffer) // PAGE)
    assert 60 << 10 < _own() - before < 70 << 10


def _own() -> int:
    """KiB of anonymous memory; pages shared with other processes are not among them."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def test_reading_happens_beside_the_use(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[bool] = []
    real = readahead._read
    seen = lambda *a: (here.append(threading.current_thread() is threading.main_thread()), real(*a))[1]  # noqa: E731
    monkeypatch.setattr(readahead, "_read", seen)
    reader = ReadAhead(parts_of(files), 3)
    reader.take(0, returns=True)
    reader._reader.shutdown()
    assert here == [False] * 3


def test_a_gradient_that_needs_bytes_read_over_fails(files: list[Path]) -> None:
    parts = parts_of(files)
    reader = ReadAhead(parts, 2)
    reader.take(0, returns=True)
    x = torch.ones(77, requires_grad=True)
    y = x * reader.view(0, parts[0][2])
    reader.take(1, returns=True)
    reader.take(2, returns=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # type: ignore[no-untyped-call]


def test_a_file_cut_short_or_changed_is_named(files: list[Path]) -> None:
    parts = parts_of(files)
    reader = ReadAhead(parts, 2)
    os.truncate(files[1], 20_000)
    with pytest.raises(DiskError, match=r"b\.bin is cut short: 20000 bytes, 42345 are needed|was changed"):
        for number in range(7):
            reader.take(number, returns=True)
    with pytest.raises(DiskError, match=r"b\.bin"):  # and again
        reader.take(4, returns=True)
    with pytest.raises(DiskError, match=r"b\.bin is cut short: 20000 bytes, 42345 are needed"):
        ReadAhead([parts[4]]).take(0, returns=True)


def test_a_file_written_over_is_named(files: list[Path]) -> None:
    reader = ReadAhead(parts_of(files), 2)
    reader.take(0, returns=True)
    os.utime(files[0], ns=(1, 1))
    with pytest.raises(DiskError, match=r"a\.bin was changed while it was in use; put the old file back"):
        reader.take(3, returns=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"gone\.bin cannot be read: No such file"):
        ReadAhead([[Range(tmp_path / "gone.bin", 0, 1)]])


def test_where_direct_reads_are_refused_the_page_cache_is_used(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, direct = os.open, os.O_DIRECT

    def refusing(path, flags, *mode):  # type: ignore[no-untyped-def]
        if flags & direct:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    told: list[str] = []
    parts = parts_of(files)
    reader = ReadAhead(parts, 2, told.append)
    for number in range(7):
        reader.take(number, returns=True)
        check(reader, parts, number)
    assert [line.partition(" is ")[0] for line in told] == [str(f) for f in files]
    assert told[0].endswith("is read through the page cache: its file system refuses direct reads")


def test_a_read_that_is_refused_goes_through_the_page_cache(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def refusing(handle, buffers, offset):  # type: ignore[no-untyped-def]
        if handle in refused:
            raise OSError(22, "Invalid argument")
        return real(handle, buffers, offset)

    told: list[str] = []
    parts = parts_of(files)
    reader = ReadAhead(parts, 2, told.append)
    refused = {f.handle for f in reader._files.values() if f.direct}
    if not refused:
        pytest.skip("this file system refuses direct reads at once")
    monkeypatch.setattr(
        os, "preadv", lambda h, b, o: refusing(h, b, o) if reader_is_direct(reader, h) else real(h, b, o)
    )
    reader.take(0, returns=True)
    check(reader, parts, 0)
    assert len(told) == 2


def reader_is_direct(reader: ReadAhead, handle: int) -> bool:
    return any(f.direct and f.handle == handle for f in reader._files.values())
