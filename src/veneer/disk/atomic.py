"""Atomic writes: write a temporary file beside the target, sync it, then rename it over the target.

The writing process locks its temporary file. If the process is killed, the lock is gone, and the next writer of the
same target removes the file.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.errors import DiskError

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
"""Names that `_beside` gives."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file in the same folder; on success it replaces `path`, on any error it is removed.

    If `path` is a link, its target is replaced.
    Raises DiskError, with path and free space, if the disk is full or not writable.
    """
    path = Path(os.path.realpath(path))
    with _explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, path.name)
        with _locked(path, folder=False) as temporary:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path`, and the old folder is removed.

    This takes two renames. A process killed between them leaves the old folder, complete, as `.NAME.*.old`.
    Raises DiskError like `replacing`, and if `path` is a file.
    """
    path = Path(os.path.realpath(path))
    old = _beside(path, "old")
    with _explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file in the folder's place")
        clear_leftovers(path.parent, path.name)
        with _locked(path, folder=True) as temporary:
            try:
                yield temporary
                for file in [*temporary.rglob("*"), temporary]:
                    _sync(file)
                if path.exists():
                    path.replace(old)
                temporary.replace(path)
                _sync(path.parent)
            except DiskError as error:  # name the file by its final path
                raise DiskError(str(error).replace(str(temporary), str(path))) from error
            finally:
                if old.exists() and not path.exists():  # interrupted between the two renames
                    old.replace(path)
                _remove(old)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of killed processes in `folder`: those of the target `name`, or all.

    Files that a running process is writing stay.
    """
    for left in folder.glob(".*.tmp"):
        found = TEMPORARY.fullmatch(left.name)
        if found is None or name not in (None, found[1]):
            continue
        with suppress(OSError):  # locked, gone, or a file system without locks
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """Indented JSON that ends in a line break."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


@contextmanager
def _locked(path: Path, *, folder: bool) -> Iterator[Path]:
    """A temporary file or folder beside `path`, locked by this process; removed on exit unless renamed."""
    temporary, handle = _beside(path, "tmp"), -1
    try:
        while handle < 0:
            if folder:
                temporary.mkdir()
            else:
                temporary.touch(exist_ok=False)
            handle = _lock(temporary)
        yield temporary
    finally:
        _remove(temporary)
        if handle >= 0:
            os.close(handle)


def _lock(path: Path) -> int:
    """Lock `path` and return the handle; -1 if another process's `clear_leftovers` removed it first."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    if path.exists():
        return handle
    os.close(handle)
    return -1


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists; a failure here must not hide an earlier error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn an OSError into a DiskError about `path`."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(_explanation(error, path)) from error


def _explanation(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        return (
            f"the disk is full: {path} was not written ({free} bytes free). "
            "Earlier files are whole; free some space and run again."
        )
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        return f"{path} was not written: {error.filename} is a file where a folder is needed. Earlier files are whole."
    about = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
    return f"{path} was not written: {error.strerror or error}{about}. Earlier files are whole."
