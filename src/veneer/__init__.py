"""veneer: adapt pretrained models on the machine you have.

Importing this package changes nothing in the process; each public name is loaded when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "veneer.adapters.attach",
    "attach": "veneer.adapters.attach",
    "load_adapter": "veneer.adapters.attach",
    "load_model": "veneer.models.load",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
