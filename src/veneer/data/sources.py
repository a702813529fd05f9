"""Rows from a file or a hub data set, each with the place it came from.

Files may be gzipped whatever their name says. All malformed lines of a JSONL file are reported at once.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from veneer.data.hub import read_hub
from veneer.errors import DataError, listed

SHOWN = 5  # malformed lines named in one message


@dataclass(frozen=True)
class Row:
    """One row as read."""

    columns: dict[str, Any]
    source: str
    """The file or hub data set, as it was given."""
    line: int
    """From 1: the line of a JSONL or CSV file; the number of the row in other sources."""

    @property
    def place(self) -> str:
        """ "rows.jsonl:17", for messages."""
        return f"{self.source}:{self.line}"


def read_rows(source: str, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read at most `limit` rows of a file, or of `split` of a hub data set.

    JSONL, JSON (an array, an object that holds one, or JSONL after all), CSV, TSV, Parquet; plain or gzipped.
    Raises DataError with file, line and what to do: not found, no rows, cut off, malformed, not objects.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source} is a folder; name one file in it ({', '.join(READERS)}, plain or .gz)")
    suffix = _suffix(path)
    if path.exists() or suffix in READERS or _looks_like_a_path(source):
        rows = _read_file(source, path, suffix, limit)
    else:
        rows = [Row(columns, source, n) for n, columns in enumerate(read_hub(source, split, limit), start=1)]
    if not rows:
        raise DataError(f"{source} holds no rows; write some into it, or name another file")
    return rows


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source)


def _read_file(source: str, path: Path, suffix: str, limit: int | None) -> list[Row]:
    if not path.exists():
        raise DataError(f"there is no file {source}{_similar(path)} (looked in {path.absolute().parent})")
    if suffix not in READERS:
        raise DataError(
            f"{source}: cannot read files that end in {suffix!r}; known: {', '.join(READERS)}, plain or .gz"
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty (0 bytes); write rows into it, or name another file")
        return [Row(columns, source, line) for line, columns in READERS[suffix](source, path, limit)]
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from error


def _similar(path: Path) -> str:
    """A hint if the name is nearly that of a file in the same folder."""
    from difflib import get_close_matches

    names = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=2, cutoff=0.8)
    return f"; is it {' or '.join(close)}?" if close else ""


Numbered = Iterator[tuple[int, dict[str, Any]]]


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unzipped if they begin as gzip does."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if zipped:
            with gzip.open(raw) as unzipped:
                yield cast(IO[bytes], unzipped)
        else:
            yield raw


def _lines(source: str, path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; raises DataError where a gzip stream ends early."""
    done = 0
    with _open(path) as file:
        try:
            for done, line in enumerate(file, start=1):
                yield done, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{source}: the gzip stream breaks off after line {done} ({error}); the file is half-written or "
                "damaged, fetch or write it again"
            ) from error


def _decoded(raw: bytes, first: bool) -> str:
    """UTF-8, without the byte order mark of a first line.  Raises ValueError with the offending byte."""
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        wrong, at = raw[error.start], error.start + 1
        raise ValueError(f"not UTF-8 (byte 0x{wrong:02x} at position {at}); save the file as UTF-8") from None


def _text(source: str, path: Path) -> str:
    """The whole file as text; raises DataError naming the line that is not UTF-8."""
    lines = []
    for number, raw in _lines(source, path):
        try:
            lines.append(_decoded(raw, first=number == 1))
        except ValueError as error:
            raise DataError(f"{source}:{number}: {error}") from None
    return "".join(lines)


def _parsed(text: str) -> Any:
    """JSON -> value.  Raises ValueError in words."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("invalid text: half of a \\ud800-\\udfff surrogate pair") from None


def _jsonl(source: str, path: Path, limit: int | None) -> Numbered:
    """One object a line; blank lines are skipped. Reads to the end of the rows wanted before it gives any."""
    good: list[tuple[int, dict[str, Any]]] = []
    bad: list[str] = []
    for number, raw in _lines(source, path):
        if limit is not None and len(good) >= limit:
            break
        try:
            text = _decoded(raw, first=number == 1).strip()
            if not text:
                continue
            value = _parsed(text)
            if not isinstance(value, dict):
                raise ValueError(f"a row is an object {{...}}, this is {_kind(value)}")
            good.append((number, value))
        except ValueError as error:
            cut = "" if raw.endswith(b"\n") else " (the last line, without a line end: half-written?)"
            bad.append(f"line {number}: {error}{cut}")
    if bad:
        raise DataError(f"{source}: {len(bad)} malformed\n{listed(bad, SHOWN)}\nCorrect or remove them.")
    yield from good


def _json(source: str, path: Path, limit: int | None) -> Numbered:
    """An array of objects, an object with exactly one array of objects in it, or JSONL under another name."""
    text = _text(source, path)
    if re.match(r"\s*\{[^\n]*\}\s*\n\s*\{", text):
        yield from _jsonl(source, path, limit)
        return
    try:
        value = json.loads(text)
        _check_surrogates(value)
    except json.JSONDecodeError as error:
        cut = " (the end of the file: half-written?)" if error.pos >= len(text.rstrip()) else ""
        raise DataError(
            f"{source}:{error.lineno}: invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}{cut}. "
            "Correct it, or write one object a line into a .jsonl file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: invalid JSON: {error}") from error
    for number, row in enumerate(islice(_array(source, value), limit), start=1):
        if not isinstance(row, dict):
            raise DataError(f"{source}: item {number} is {_kind(row)}; a row is an object {{...}}")
        yield number, row


def _array(source: str, value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        arrays = {k: v for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        seen = f"an object with the keys {', '.join(map(repr, value)) or '(none)'}"
    else:
        seen = _kind(value)
    raise DataError(f"{source}: wanted an array of rows, or an object that holds exactly one, found {seen}")


def _kind(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _csv(source: str, path: Path, limit: int | None) -> Numbered:
    """A header line, then one row a record; every row has as many cells as the header."""
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(source, path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        twice = sorted({name for name in header if header.count(name) > 1 or not name.strip()})
        if twice:
            raise DataError(f"{source}:1: columns without a name or named twice: {', '.join(map(repr, twice))}")
        begin, given = reader.line_num + 1, 0
        for cells in reader:
            if limit is not None and given >= limit:
                return
            if cells:  # a blank line has none
                if len(cells) != len(header):
                    raise DataError(f"{source}:{begin}: {len(cells)} cells, but the header names {len(header)} columns")
                given += 1
                yield begin, dict(zip(header, cells, strict=True))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}:{reader.line_num}: invalid CSV: {error}. A .jsonl file has no such limits."
        ) from error


def _parquet(source: str, path: Path, limit: int | None) -> Numbered:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{source}: Parquet needs pyarrow: pip install 'veneer[data]'") from error
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=min(limit or 4096, 4096))
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(islice(rows, limit), start=1)
    except (ArrowException, OSError) as error:
        raise DataError(f"{source}: not a whole Parquet file ({error}); fetch or write it again") from error


READERS: dict[str, Callable[[str, Path, int | None], Numbered]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
