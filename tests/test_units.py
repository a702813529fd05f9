"""Bytes and durations as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (999 * 1024, "999 KiB"),
        (int(999.7 * 1024), "1000 KiB"),
        (1023 * 1024, "1023 KiB"),
        (7_400_000_000, "6.89 GiB"),
        (5 * 2**50, "5120 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_bytes_are_written_with_three_digits(n: int, text: str) -> None:
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("0", 0),
        ("1024", 1024),
        (1024, 1024),
        ("8GiB", 8 * 2**30),
        (" 8 GiB ", 8 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        (".5TB", 5 * 10**11),
        ("7 B", 7),
    ],
)
def test_sizes_are_read(text: str | int, n: int) -> None:
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "GiB", "8 gib", "8 GiB free", "-1", -1, "1e9", "1,5 GiB", True, "8 XB"])
def test_anything_else_is_refused_with_an_example(text: str | int) -> None:
    with pytest.raises(ConfigError, match="is not a size; write it like 8GiB, 500MB or 1024") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)


@given(st.integers(0, 2**55))
def test_what_is_written_is_read_again_to_its_three_digits(n: int) -> None:
    assert parse_bytes(format_bytes(n)) == pytest.approx(n, rel=0.0051, abs=0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 00 min"),
        (7300, "2 h 02 min"),
        (7199, "2 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
