"""The ways to change a layer: one file each, registered by name in METHODS."""

from veneer.methods.base import METHODS, Delta, FrozenLayer, MethodConfig, Role
from veneer.registry import import_siblings

import_siblings(__name__, list(__path__))

__all__ = ["METHODS", "Delta", "FrozenLayer", "MethodConfig", "Role"]
