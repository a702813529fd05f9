"""Memory cgroups of both versions, on a made tree in which this test does what the kernel does."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import memory_group as module
from benchmarks.memory_group import memory_group, parents

MIB = 2**20


class Kernel:
    """Version 2, as cgroups(7) and the kernel's cgroup-v2.rst have it: new groups get the files of the controllers that
    their parent hands on; only a group without processes, or the root, may begin to.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mount = root / "sys/fs/cgroup"
        self.written: list[tuple[str, str]] = []
        self._mkdir, self._rmdir = Path.mkdir, shutil.rmtree
        self.group(self.mount, controllers="cpu memory", handed_on="cpu")
        monkeypatch.setattr(Path, "mkdir", lambda path, *_, **__: self.mkdir(path))
        monkeypatch.setattr(Path, "rmdir", lambda path: self._rmdir(path))
        monkeypatch.setattr(module, "_write", self.write)

    def group(self, folder: Path, *, controllers: str, handed_on: str = "", processes: str = "") -> None:
        self._mkdir(folder, parents=True, exist_ok=True)
        for name, text in {"controllers": controllers, "subtree_control": handed_on, "procs": processes}.items():
            (folder / f"cgroup.{name}").write_text(text)
        if "memory" in controllers and folder != self.mount:
            for name in ("max", "swap.max", "current"):
                (folder / f"memory.{name}").write_text("max")

    def mkdir(self, path: Path) -> None:
        if (path.parent / "closed").exists():
            raise OSError(errno.EACCES, "Permission denied")
        self.group(path, controllers=(path.parent / "cgroup.subtree_control").read_text())

    def write(self, file: Path, text: str) -> None:
        if not file.exists():
            raise module.Refusal(f"{file}: No such file or directory")
        if file.name == "cgroup.subtree_control":
            if (file.parent / "cgroup.procs").read_text() and file.parent != self.mount:
                raise module.Refusal(f"{file}: {os.strerror(errno.EBUSY)}")
            now = {*file.read_text().split(), text[1:]} if text[0] == "+" else {*file.read_text().split()} - {text[1:]}
            file.write_text(" ".join(sorted(now)))
        else:
            file.write_text(text)
        self.written.append((file.name, text))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/session\n")
    made = Kernel(tmp_path, monkeypatch)
    made.group(made.mount / "user", controllers="cpu memory", handed_on="memory")
    made.group(made.mount / "user/session", controllers="memory", processes="1 2 3")
    return made


def test_a_group_is_made_where_memory_is_handed_on(kernel: Kernel, tmp_path: Path) -> None:
    """This process's own group has processes, so it cannot hand anything on; the one above does already."""
    with memory_group(700 * MIB, tmp_path) as group:
        assert group.parent == kernel.mount / "user" and group.name.startswith("veneer-")
        assert (group / "memory.max").read_text() == str(700 * MIB) and (group / "memory.swap.max").read_text() == "0"
        assert (group / "cgroup.procs").read_text().strip().isdigit()  # a process was let in
    assert not list(kernel.mount.rglob("veneer-*"))
    assert [name for name, _ in kernel.written] == ["memory.max", "memory.swap.max"]


def test_a_group_without_processes_is_told_to_hand_it_on_and_told_back(kernel: Kernel, tmp_path: Path) -> None:
    (kernel.mount / "user/cgroup.subtree_control").write_text("")
    with memory_group(MIB, tmp_path) as group:
        assert group.parent == kernel.mount / "user"
        assert (kernel.mount / "user/cgroup.subtree_control").read_text() == "memory"
    assert (kernel.mount / "user/cgroup.subtree_control").read_text() == ""


def test_a_system_that_does_not_count_swap_has_no_file_for_it(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernel.mkdir

    def without(path: Path) -> None:
        real(path)
        (path / "memory.swap.max").unlink()

    monkeypatch.setattr(kernel, "mkdir", without)
    with memory_group(MIB, tmp_path) as group:
        assert not (group / "memory.swap.max").exists()


def test_every_reason_is_told_where_none_can_be_made(kernel: Kernel, tmp_path: Path) -> None:
    (kernel.mount / "user/closed").touch()
    (kernel.mount / "closed").touch()
    before = (kernel.mount / "cgroup.subtree_control").read_text()
    with pytest.raises(SystemExit) as e, memory_group(MIB, tmp_path):
        raise AssertionError("made")
    said = str(e.value)
    assert said.startswith("no memory cgroup can be made: ")
    assert "user/session/cgroup.subtree_control: Device or resource busy" in said
    assert f"{kernel.mount / 'user'}: Permission denied" in said and f"{kernel.mount}: Permission denied" in said
    assert (kernel.mount / "cgroup.subtree_control").read_text() == before


def test_a_group_that_no_process_may_enter_is_removed(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "sh: write error: Permission denied\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"no process may enter: sh: write error"), memory_group(MIB, tmp_path):
        raise AssertionError("made")
    assert not list(kernel.mount.rglob("veneer-*"))


def test_an_error_inside_is_nobody_elses_and_the_group_goes(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), memory_group(MIB, tmp_path):
        raise ZeroDivisionError
    assert not list(kernel.mount.rglob("veneer-*"))


@pytest.mark.parametrize(
    ("lines", "version", "folders"),
    [
        ("4:memory:/jobs/one\n0::/\n", 1, ["memory/jobs", "memory"]),  # /jobs/one is not visible in this container
        ("3:cpu,memory:/jobs\n", 1, ["memory/jobs", "memory"]),
        ("0::/\n", 0, []),  # a second hierarchy, without the controller
        ("5:cpu:/\n", 0, []),
    ],
)
def test_version_1_and_systems_with_both(lines: str, version: int, folders: list[str], tmp_path: Path) -> None:
    mount = tmp_path / "sys/fs/cgroup"
    (mount / "memory/jobs").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    assert parents(tmp_path) == (version, [mount / folder for folder in folders])


def test_version_1_limits_memory_and_swap_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str]] = []
    parent = tmp_path / "sys/fs/cgroup/memory"
    parent.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/\n")
    real = Path.mkdir

    def mkdir(path: Path) -> None:
        real(path)
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "cgroup.procs"):
            (path / name).touch()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)
    monkeypatch.setattr(module, "_write", lambda file, text: written.append((file.name, text)))
    with memory_group(MIB, tmp_path) as group:
        assert group.parent == parent
    assert written == [("memory.limit_in_bytes", str(MIB)), ("memory.memsw.limit_in_bytes", str(MIB))]
    assert not group.exists()
