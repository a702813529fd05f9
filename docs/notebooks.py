"""Turn examples/notebooks/*.py, scripts with `# %%` cells, into Jupyter notebooks and into pages of the site."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))


def cells(script: str) -> Iterator[tuple[str, str]]:
    """("markdown" | "code", text) of each cell; `# %% [markdown]` begins one of text, in comments."""
    kind, lines = "code", list[str]()
    for line in [*script.splitlines(), "# %%"]:
        if not line.startswith("# %%"):
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
            continue
        if text := "\n".join(lines).strip("\n"):
            yield kind, text
        kind, lines = "markdown" if "[markdown]" in line else "code", []


def as_notebook(script: str) -> dict[str, Any]:
    """The script in Jupyter's format, version 4.5, not yet run."""
    return {
        "cells": [
            {"id": f"cell-{number}", "cell_type": kind, "metadata": {}, "source": text}
            | ({"execution_count": None, "outputs": []} if kind == "code" else {})
            for number, (kind, text) in enumerate(cells(script))
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def as_page(script: str) -> str:
    """The script as Markdown."""
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells(script)) + "\n"


def write(folder: Path) -> list[Path]:
    """Write every notebook into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for script in SCRIPTS:
        written.append(folder / f"{script.stem}.ipynb")
        text = json.dumps(as_notebook(script.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
        written[-1].write_text(text + "\n", encoding="utf-8")
    return written
