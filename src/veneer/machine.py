"""The machine this process runs on."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of converted models and measurements: $VENEER_CACHE, else $XDG_CACHE_HOME/veneer, else ~/.cache/veneer."""
    if own := os.environ.get("VENEER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "veneer"


def compute_dtype() -> str:
    return "bfloat16"


def prepare_process() -> None:
    """Set up OpenMP for a process of veneer's own, before torch starts."""
