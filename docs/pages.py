"""Parts of generated pages: tables, and text between two marks of a page that is written by hand."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def between_marks(path: Path, name: str, text: str) -> str:
    """The page with what stands between its marks for `name` replaced."""
    begin, end = f"<!-- {name}: written by docs/generate.py -->\n", f"<!-- end of {name} -->\n"
    before, opened, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    assert opened and closed, f"{path} needs the lines {begin!r} and {end!r}"
    return before + begin + text + end + after
