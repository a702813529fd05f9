"""Files are whole or as they were: on success, on errors, on a full disk, on Ctrl-C, and under a real size limit."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from veneer.disk import atomic
from veneer.disk.atomic import clear_leftovers, replacing, replacing_folder, write_json
from veneer.errors import ConfigError, DiskError


def put(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def put_folder(path: Path, text: str) -> None:
    with replacing_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_made_with_its_parents_and_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    put(tmp_path / "a" / "b" / "file", "new")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"
    assert (tmp_path / "a" / "b" / "file").stat().st_mode == plain.stat().st_mode
    assert names(tmp_path / "a" / "b") == ["file"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    put(tmp_path / "file", "old")
    put(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_the_place_is_taken_only_at_the_end(tmp_path: Path) -> None:
    put(tmp_path / "file", "old")
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "file").read_text() == "old"


def test_where_a_link_points_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    put_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "deep" / "file").read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "left over").touch()
    put_folder(folder, "new")
    assert names(folder) == ["deep"]
    assert names(tmp_path) == ["adapter"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ConfigError("no"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("way", [replacing, replacing_folder])
def test_any_error_leaves_the_earlier_one_and_no_temporary(
    way: Callable[[Path], AbstractContextManager[Path]], error: BaseException, tmp_path: Path
) -> None:
    (put if way is replacing else put_folder)(tmp_path / "thing", "old")
    with pytest.raises((type(error), DiskError)), way(tmp_path / "thing"):
        raise error
    file = tmp_path / "thing" if way is replacing else tmp_path / "thing" / "deep" / "file"
    assert file.read_text() == "old"
    assert names(tmp_path) == ["thing"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_with_what_is_free_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "file", "old")
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DiskError) as caught:
        put(tmp_path / "file", "new")
    said = str(caught.value)
    assert said.startswith(f"the disk is full: {tmp_path / 'file'} was not written (")
    assert said.endswith(" bytes free). Earlier files are whole; free some space and run again.")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_earlier_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_folder(tmp_path / "adapter", "old")
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DiskError, match="the disk is full"):
        put_folder(tmp_path / "adapter", "new")
    assert (tmp_path / "adapter" / "deep" / "file").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_interrupted_between_the_two_renames_the_earlier_folder_comes_back(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_folder(tmp_path / "adapter", "old")
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises((type(error), DiskError)):
        put_folder(tmp_path / "adapter", "new")
    assert (tmp_path / "adapter" / "deep" / "file").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


WRITING = """
import sys, time
from pathlib import Path
from veneer.disk.atomic import clear_leftovers, replacing, replacing_folder
with (replacing_folder if sys.argv[2] == "folder" else replacing)(Path(sys.argv[1])) as temporary:
    print(temporary.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_stays(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITING, str(tmp_path / "thing[1]"), kind]
    mine = tmp_path / ".thing[1].tmp"  # of somebody else
    other = tmp_path / ".thing1.0123abcd.tmp"  # of another name
    mine.touch()
    other.touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        left = tmp_path / killed.stdout.readline().strip()
        write = put if kind == "file" else put_folder
        try:
            write(tmp_path / "thing[1]", "first")
            assert left.exists()
        finally:
            killed.kill()
            killed.wait()
    assert left.exists()
    write(tmp_path / "thing[1]", "second")
    assert names(tmp_path) == sorted([mine.name, other.name, "thing[1]"])
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [mine.name, "thing[1]"]


@pytest.mark.parametrize("way", [replacing, replacing_folder])
def test_a_temporary_that_is_cleared_before_it_is_locked_is_made_again(
    way: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, cleared = atomic.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not cleared:
            cleared.append(True)
            clear_leftovers(tmp_path)
        lock(handle, how)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    (put if way is replacing else put_folder)(tmp_path / "thing", "new")
    assert cleared and names(tmp_path) == ["thing"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from veneer.disk.atomic import write_json
from veneer.errors import DiskError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_json(Path(sys.argv[1]), "x" * 10_000)
except DiskError as error:
    print(error)
"""


def test_a_real_write_that_fails_midway(tmp_path: Path) -> None:
    path = tmp_path / "file"
    put(path, "old")
    ran = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{path} was not written: File too large. Earlier files are whole.\n"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("mine")
    with pytest.raises(DiskError, match="thing was not written: there is a file in the folder's place"):
        put_folder(tmp_path / "thing", "new")
    with pytest.raises(DiskError, match=r"below was not written: .*Earlier files are whole"):
        put(tmp_path / "thing" / "below", "new")
    assert (tmp_path / "thing").read_text() == "mine"
    assert names(tmp_path) == ["thing"]


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    with pytest.raises(DiskError, match="thing was not written: Is a directory"):
        put(tmp_path / "thing", "new")
    assert names(tmp_path) == ["thing"]


def test_a_missing_file_read_by_the_writer_is_named(tmp_path: Path) -> None:
    said = r"out was not written: No such file or directory \(.*source\)"
    with pytest.raises(DiskError, match=said), replacing(tmp_path / "out"):
        (tmp_path / "source").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError, match="was not written: Permission denied"):
        put(tmp_path / "file", "new")


def test_json_is_indented_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"word": "naïve", "n": [1]})
    text = (tmp_path / "f.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"word": "naïve", "n": [1]}
    assert "naïve" in text
    assert text.startswith('{\n  "word"')
    assert text.endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_earlier_file(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "f.json", {1, 2})
    assert json.loads((tmp_path / "f.json").read_text()) == 1
    assert names(tmp_path) == ["f.json"]
