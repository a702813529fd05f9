import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.sources import Row, read_rows
from veneer.errors import DataError

ROWS = [{"question": "왜? 😀", "answer": 1}, {"question": 'a "b"\n', "answer": None}]
Write = Callable[[Path, list[Any]], str]


def columns(source: str, **kwargs: Any) -> list[dict[str, Any]]:
    return [r.columns for r in read_rows(source, **kwargs)]


def test_jsonl_with_blank_lines_keeps_the_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(["\ufeff" + json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]), encoding="utf-8")
    assert read_rows(str(file)) == [Row(ROWS[0], str(file), 1), Row(ROWS[1], str(file), 3)]
    assert read_rows(str(file))[1].place == f"{file}:3"


def test_gzip_is_seen_by_its_bytes_not_its_name(tmp_path: Path, write_jsonl: Write) -> None:
    plain = Path(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    for name in ("rows.jsonl.gz", "other.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
        assert columns(str(tmp_path / name)) == ROWS


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
def test_json_array_or_object_that_holds_one(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(wrap(ROWS), indent=2), encoding="utf-8")
    assert [(r.line, r.columns) for r in read_rows(str(file))] == [(1, ROWS[0]), (2, ROWS[1])]


def test_jsonl_named_json(tmp_path: Path, write_jsonl: Write) -> None:
    assert columns(write_jsonl(tmp_path / "rows.json", ROWS)) == ROWS


def test_csv_and_tsv(tmp_path: Path) -> None:
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        file = tmp_path / name
        file.write_text(f'a{mark}b\n"x\ny"{mark}2\n\n3{mark}\n', encoding="utf-8")
        assert [(r.line, r.columns) for r in read_rows(str(file))] == [
            (2, {"a": "x\ny", "b": "2"}),
            (5, {"a": "3", "b": ""}),
        ]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([{"a": i, "m": [{"role": "user"}]} for i in range(10)]), file)
    assert columns(str(file), limit=2) == [{"a": 0, "m": [{"role": "user"}]}, {"a": 1, "m": [{"role": "user"}]}]
    assert [r.line for r in read_rows(str(file))] == list(range(1, 11))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.parquet: not a whole Parquet file"):
        read_rows(str(file))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\nbroken\n', encoding="utf-8")
    assert columns(str(file), limit=2) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("r.jsonl", b"", r"r\.jsonl is empty \(0 bytes\)"),
        ("r.jsonl", b"\n\n", r"r\.jsonl holds no rows"),
        ("r.jsonl", b'{"a": 1}\n{"a": }\n', r"r\.jsonl: 1 malformed\n  line 2: invalid JSON: .* at column 7"),
        ("r.jsonl", b'{"a": 1}\n{"a": "x', r"line 2: invalid JSON: .*the last line, without a line end: half-written"),
        ("r.jsonl", b'{"a": 1}\n[1]\n"x"\n', r"2 malformed\n  line 2: .*an array\n  line 3: .*a string"),
        ("r.jsonl", b'{"a": "\xff"}\n', r"line 1: not UTF-8 \(byte 0xff at position 8\)"),
        ("r.jsonl", b'{"a": "\\ud800"}\n', r"line 1: invalid text: half of a"),
        ("r.jsonl", b"[" * 100_000 + b"\n", r"line 1: invalid JSON"),
        ("r.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", r"line 1: .*digits"),
        ("r.json", b'[{"a": 1},\n {"a": 2', r"r\.json:2: invalid JSON: .*the end of the file: half-written"),
        ("r.json", b'[{"a": 1}, 3]', r"item 2 is a number; a row is an object"),
        ("r.json", b'{"a": [1], "b": 2}', r"an object that holds exactly one, found an object with the keys 'a', 'b'"),
        ("r.json", b"[]", r"holds no rows"),
        ("r.json", b'[{"a": "\\udfff"}]', r"half of a"),
        ("r.csv", b"a,b\n1,2\n3\n", r"r\.csv:3: 1 cells, but the header names 2 columns"),
        ("r.csv", b"a,a\n1,2\n", r"r\.csv:1: columns .* named twice: 'a'"),
        ("r.csv", b'a,b\n1,"cut of', r"r\.csv:2: invalid CSV: unexpected end of data"),
        ("r.csv", b"a,b\n", r"holds no rows"),
        ("r.csv", b"a,b\n1,\xe9\n", r"r\.csv:2: not UTF-8"),
        ("r.txt", b"hello", r"cannot read files that end in '\.txt'; known: \.jsonl"),
    ],
)
def test_bad_files_say_what_is_wrong_and_where(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_rows(str(tmp_path / name))


def test_missing_file_names_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"there is no file .*trian\.jsonl; is it train\.jsonl\?"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="is a folder; name one file in it"):
        read_rows(str(tmp_path))


def test_gzip_cut_short_says_how_many_lines_came(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"a": f"{i * 7919 % 1009:x}"}) + "\n" for i in range(3000)).encode())
    (tmp_path / "r.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"r\.jsonl\.gz: the gzip stream breaks off after line [1-9]\d+"):
        read_rows(str(tmp_path / "r.jsonl.gz"))


def test_only_the_first_malformed_lines_are_listed(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("x\n" * 9)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "r.jsonl"))
    assert str(caught.value).count("\n  line ") == 5
    assert "... and 4 more" in str(caught.value)


VALID = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS * 3).encode()


@given(st.integers(0, len(VALID) - 1), st.binary(max_size=4), st.sampled_from(["flip", "cut", "insert"]))
def test_damaged_jsonl_gives_rows_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes, how: str
) -> None:
    damaged = {
        "flip": VALID[:at] + bytes([VALID[at] ^ 0x81]) + VALID[at + 1 :],
        "cut": VALID[:at],
        "insert": VALID[:at] + junk + VALID[at:],
    }[how]
    file = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    file.write_bytes(damaged)
    try:
        rows = read_rows(str(file))
    except DataError as error:
        assert "rows.jsonl" in str(error)
        if damaged.strip():
            line = int(str(error).partition("line ")[2].partition(":")[0])
            bad = damaged.split(b"\n")[line - 1]
            with pytest.raises((ValueError, AssertionError)):  # the line it names is bad indeed
                assert isinstance(json.loads(bad.decode()), dict)
    else:
        assert all(isinstance(r.columns, dict) for r in rows)
