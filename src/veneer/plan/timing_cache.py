"""Measurements kept in the cache under everything that they depend on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch

from veneer import machine
from veneer.disk.atomic import write_json
from veneer.errors import DiskError


def kept(facts: Mapping[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was measured under the same facts on this machine with these versions and threads, else measured now."""
    about = machine.describe()
    here = {
        "cpu": [about.cpu, *about.isa],
        "threads": torch.get_num_threads(),
        "versions": [version("veneer"), torch.__version__, version("transformers")],
    }
    key = hashlib.sha256(json.dumps([here, facts], sort_keys=True).encode()).hexdigest()
    file = machine.cache_dir() / "timings" / f"{key[:32]}.json"
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # absent, or damaged: measured again
        found = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return {str(name): float(value) for name, value in found.items()}
    seconds = measure()
    with suppress(DiskError):  # a cache that cannot be written costs the next plan some seconds
        write_json(file, {"seconds": seconds, "here": here, "facts": facts})
    return seconds
