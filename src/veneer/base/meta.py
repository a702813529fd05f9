"""A base on torch's meta device: the real modules and storages, with sizes and no data.

Preflight and plan run the code that trains on it.  It is built once for a run; `shortened` copies its first blocks.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base.base import Base
from veneer.base.device import Device
from veneer.base.memory_tracker import MemoryTracker
from veneer.base.quant_cache import is_quantized
from veneer.base.quantize import Quantizer, packed_names
from veneer.base.storage_config import BaseStorage, config_of
from veneer.disk.tensors import open_tensors
from veneer.errors import ModelError, VeneerError
from veneer.models.skeleton import build_skeleton, shorten_config
from veneer.storage import Storage, StorageConfig, from_tensors
from veneer.storage.layers import Stored, store_weight

META = Device(torch.device("meta"))


class Untraceable(ModelError):
    """Code cannot run on the meta device: it needs the values of tensors."""


def meta_base(
    folder: Path, dtype: torch.dtype, storage: BaseStorage | None = None, *, name: str = "", blocks: int | None = None
) -> Base:
    """The base of `folder`, frozen, on the meta device; only configuration and headers are read.

    storage   how its linear layers are stored; a folder that is quantized already keeps its own
    blocks    build only the first `blocks` blocks
    Raises ModelError for an architecture that transformers does not build, Untraceable for a storage that needs values.
    """
    network = build_skeleton(folder, dtype, blocks=blocks).to("meta")
    base = Base(network.eval().requires_grad_(False), None, name or str(folder), folder, META)
    if (storage := storage or _storage_in(folder)) is not None:
        with traceable(base.name), MemoryTracker():
            Quantizer(storage, kept=_QuantizeOnce()).on_whole_model(network)
        for module in network.modules():
            if isinstance(module, Stored) and hasattr(module.storage, "_fast"):
                object.__setattr__(module.storage, "_fast", _NoKernel())
        network.eval().requires_grad_(False)
    return base


def shortened(meta: Base, count: int) -> Base:
    """The first `count` blocks of `meta`, copied; more than there are repeat the last."""
    path = _block_list(meta)
    if path is None:  # several lists (an encoder and a decoder), or blocks outside of any
        return meta_base(meta.files, meta.dtype, meta.storage, name=meta.name, blocks=count)
    left_out = list(meta.blocks.values())[count:]
    network = copy.deepcopy(meta.network, {id(block): nn.Identity() for block in left_out})
    blocks = network.get_submodule(path)
    del blocks[count:]
    while len(blocks) < count:
        shared = {id(m.config): m.config for m in blocks[-1].modules() if hasattr(m, "config")}
        blocks.append(copy.deepcopy(blocks[-1], shared))
        for module in blocks[-1].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(blocks) - 1
    shorten_config(network.config.get_text_config(), count)
    return replace(meta, network=network, adapters={}, attached=[])


@contextmanager
def traceable(name: str) -> Iterator[None]:
    """Inside, code runs on tensors without data; raises Untraceable where the model `name` needs their values."""
    try:
        yield
    except VeneerError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Untraceable(
            f"{name}: a step cannot be traced on tensors without data, so its memory cannot be estimated "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error


def _storage_in(folder: Path) -> BaseStorage | None:
    """The storage of a folder that holds quantized weights; None for dense ones."""
    if not is_quantized(folder):
        return None
    tensors = open_tensors(folder)
    if not (packed := packed_names(tensors)):  # config.json says so, but the files are dense
        return None
    home, names = next(iter(packed.items()))
    return BaseStorage(config=config_of(from_tensors({n: tensors.map(n) for n in names}, home)))


def _block_list(base: Base) -> str | None:
    """Path of the one ModuleList that holds all blocks; None if there is none."""
    path = next(iter(base.blocks), "").rpartition(".")[0]
    owner = base.network.get_submodule(path)
    same = isinstance(owner, nn.ModuleList) and list(owner) == list(base.blocks.values())
    return path if same else None


class _QuantizeOnce:
    """Quantizes one weight of each shape and dtype; others of that shape get a copy with storage of its own."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Storage] = {}

    def __call__(self, w: Tensor, config: StorageConfig, name: str) -> Storage:
        first = self._made.get(key := (*w.shape, w.dtype))
        if first is None:
            return self._made.setdefault(key, store_weight(w, config, name))
        other = copy.copy(first)
        other._buffers = {n: b if b is None else b.new_empty(b.shape) for n, b in first._buffers.items()}
        return other


class _NoKernel:
    """Stands for a weight prepared for the C library, which cannot take one without data."""

    def accepts(self, x: Any) -> bool:
        return False
