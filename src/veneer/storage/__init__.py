"""Formats of frozen weights: one file each, registered by name in STORAGES."""

from veneer.registry import import_siblings
from veneer.storage.base import STORAGES, Storage, StorageConfig, config_from, from_tensors

import_siblings(__name__, list(__path__))

__all__ = ["STORAGES", "Storage", "StorageConfig", "config_from", "from_tensors"]
