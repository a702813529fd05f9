"""Where LoRA's A and B start: one file each, registered by name in INITS."""

from veneer.methods.init.base import INITS, Init
from veneer.registry import import_siblings

import_siblings(__name__, list(__path__))

__all__ = ["INITS", "Init"]
