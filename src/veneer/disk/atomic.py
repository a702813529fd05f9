"""Files that are either whole or as they were: written beside their place, synced, then renamed over it."""

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.errors import DiskError

YOUNG = 10.0
"""Seconds after its last change in which a temporary folder is left alone."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary, empty file in the same folder; on success it takes `path`'s place, on any error it is removed.

    Where `path` is a link, what it points to is replaced.
    Raises DiskError (what, where, how much is free) when the disk is full or may not be written.
    """
    path = Path(os.path.realpath(path))
    temporary = _beside(path, "tmp")
    with _explaining(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch(exist_ok=False)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            _remove(temporary)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes `path`'s place, and the older folder is removed.

    Two renames do it. A process killed between them leaves the older folder, whole, beside `path` as `.NAME.*.old`.
    One killed before leaves the temporary folder, which the next that writes to `path` removes.
    Raises DiskError as `replacing` does, and for a `path` that is a file.
    """
    path = Path(os.path.realpath(path))
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    with _explaining(path), ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _clear_killed(path)
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "there is a file in the folder's place")
            temporary.mkdir()
            with suppress(OSError):  # some network disks know no locks; there nothing is cleared either
                held.enter_context(_locked(temporary))
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
            _remove(temporary)
            _remove(old)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there; a failure to clean up does not hide an earlier error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, which ends with the process; raises BlockingIOError where another holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _clear_killed(path: Path) -> None:
    """Remove temporary folders of `path` that nobody holds any more; young ones may be about to be held."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if left.is_dir() and time.time() - left.stat().st_mtime > YOUNG:
                with _locked(left):
                    _remove(left)


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
