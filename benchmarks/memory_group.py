"""A memory cgroup without swap, of version 1 or 2, that is there for as long as a benchmark needs it.

In version 2 a group limits memory only where the one above it hands the memory controller on
(`cgroup.subtree_control`), and only a group without processes of its own may begin to do so. So the new group is made
in the nearest group, from this process's own upwards, that hands it on already or can be told to.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.machine import cgroup_folders

LIMITS = {1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), 2: ("memory.max", "memory.swap.max")}
"""Files of the limit and of the swap's, by version; a system that does not count swap lacks the latter."""
HANDED_ON, PROCESSES = "cgroup.subtree_control", "cgroup.procs"


@contextmanager
def memory_group(limit: int, root: Path = Path("/")) -> Iterator[Path]:
    """The folder of a cgroup of at most `limit` bytes; exits with the reasons where none can be made.

    root    where /proc and /sys are found
    """
    version, folders = parents(root)
    why = []
    for parent in folders:
        try:
            with _handing_on(parent, version):
                group = _made(parent, version, limit)
                try:
                    yield group
                finally:
                    _removed(group)
            return
        except Refusal as error:
            why.append(str(error))
    sys.exit(f"no memory cgroup can be made: {'; '.join(why) or 'this system has no memory controller'}")


class Refusal(Exception):
    """What the system does not allow, and where."""


def parents(root: Path) -> tuple[int, list[Path]]:
    """The version, and the folders of this process's memory cgroup and of all above it that are visible here."""
    if folders := cgroup_folders(root, "memory"):
        return 1, folders
    handed = _read(root / "sys/fs/cgroup/cgroup.controllers").split()
    return (2, cgroup_folders(root, "")) if "memory" in handed else (0, [])


@contextmanager
def _handing_on(parent: Path, version: int) -> Iterator[None]:
    """Inside, groups made in `parent` may limit memory; afterwards it is as it was."""
    told = version == 2 and "memory" not in _read(parent / HANDED_ON).split()
    if told:
        _write(parent / HANDED_ON, "+memory")
    try:
        yield
    finally:
        if told:
            with suppress(Refusal):
                _write(parent / HANDED_ON, "-memory")


def _made(parent: Path, version: int, limit: int) -> Path:
    """A new group that a process of ours can enter."""
    group = parent / f"veneer-{secrets.token_hex(4)}"
    try:
        group.mkdir()
    except OSError as error:
        raise Refusal(f"{parent}: {error.strerror}") from error
    memory, swap = LIMITS[version]
    try:
        _write(group / memory, str(limit))
        if (group / swap).exists():
            _write(group / swap, "0" if version == 2 else str(limit))
        entering = ["sh", "-c", 'echo $$ > "$0"', str(group / PROCESSES)]
        done = subprocess.run(entering, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Refusal(f"{group}: no process may enter: {done.stderr.strip()}")
    except Refusal:
        _removed(group)
        raise
    return group


def _removed(group: Path) -> None:
    for wait in range(100):
        with suppress(OSError):  # the last process is still being taken apart
            group.rmdir()
            return
        time.sleep(0.02 * wait)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""


def _write(file: Path, text: str) -> None:
    """Into a file that the kernel has made."""
    try:
        handle = os.open(file, os.O_WRONLY)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise Refusal(f"{file}: {error.strerror}") from error
