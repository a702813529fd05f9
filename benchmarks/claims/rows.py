"""Rows that a benchmark makes itself, as a file for a recipe."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def written(rows: Iterable[Mapping[str, str]], path: Path) -> str:
    """Write the rows as JSONL; returns the path as a recipe takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
