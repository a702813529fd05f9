"""Files that are either whole or as they were: written beside their place, synced, then renamed over it.

What is being written is locked by its process.  A killed one leaves it unlocked, and the next to write the same clears
it away.
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
"""What `_beside` calls them."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary, empty file in the same folder; on success it takes `path`'s place, on any error it is removed.

    Where `path` is a link, what it points to is replaced.
    Raises DiskError (what, where, how much is free) when the disk is full or may not be written.
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
    """Yield a temporary folder beside `path`; on success it takes `path`'s place, and the older folder is removed.

    Two renames do it. A process killed between them leaves the older folder, whole, beside `path` as `.NAME.*.old`.
    Raises DiskError as `replacing` does, and for a `path` that is a file.
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
            except DiskError as error:  # about a file in the temporary folder: named by the place it was meant for
                raise DiskError(str(error).replace(str(temporary), str(path))) from error
            finally:
                if old.exists() and not path.exists():  # interrupted between the two renames
                    old.replace(path)
                _remove(old)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of their writing to `name`, or to anything, in `folder`; what a living one
    writes stays.
    """
    for left in folder.glob(".*.tmp"):
        found = TEMPORARY.fullmatch(left.name)
        if found is None or name not in (None, found[1]):
            continue
        with suppress(OSError):  # locked, gone, or a file system that locks nothing
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


@contextmanager
def _locked(path: Path, *, folder: bool) -> Iterator[Path]:
    """A temporary file or folder beside `path`, locked by this process; removed at the end unless it was renamed."""
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
    """A handle that keeps `path` locked; -1 if `clear_leftovers` of another process was faster and removed it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    with suppress(OSError):  # a file system that locks nothing
        fcntl.flock(handle, fcntl.LOCK_EX)
    if path.exists():
        return handle
    os.close(handle)
    return -1


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there; a failure to clean up does not hide an earlier error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


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
