"""What every benchmark ends with: one line of JSON with the machine, the commit and its figures under plain names."""

import json
import subprocess
from pathlib import Path
from typing import Any

from veneer.machine import describe


def closing_line(figures: dict[str, Any]) -> None:
    """Print the line."""
    print(json.dumps({**figures, "machine": describe().summary(), "commit": commit()}), flush=True)


def commit() -> str:
    """The commit that was measured, with a mark if files were changed since; "unknown" outside a checkout."""
    try:
        here = Path(__file__).parent
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()
