"""Format and parse sizes in bytes and durations."""

import re

from veneer.errors import ConfigError

_UNITS = {"B": 1} | {f"{p}B": 10**e for p, e in zip("KMGT", (3, 6, 9, 12), strict=True)}
_UNITS |= {f"{p}iB": 2**e for p, e in zip("KMGT", (10, 20, 30, 40), strict=True)}


def format_bytes(n: float) -> str:
    """Format with binary units and three significant digits: 7_400_000_000 -> "6.89 GiB"."""
    size, unit = float(n), "B"
    for name in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, name
    return f"{int(size)} B" if unit == "B" else f"{size:.3g} {unit}" if abs(size) < 999.5 else f"{size:.0f} {unit}"


def parse_bytes(text: str | int) -> int:
    """ "8 GiB", "500MB", "1024" or 1024 -> bytes.  Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?B|B)?\s*", str(text))
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write it like 8GiB, 500MB or 1024")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def format_seconds(seconds: float) -> str:
    """0.42 -> "0.4 s", 75 -> "1 min 15 s", 7300 -> "2 h 02 min"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
