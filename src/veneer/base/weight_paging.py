"""Quantized weights of the model's blocks, read from their files ahead of use instead of kept in memory.

A block's codes and absmax are tensors over one of a few buffers (disk/readahead.py). Each use of a weight first waits
for its block to be there. In a backward pass a block's buffer must hold it until its own backward is done, which is so
where blocks are recomputed: each is computed and differentiated before the one below is touched. Without recomputing,
autograd would keep tensors over buffers that are read over; torch then refuses by their version.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from veneer.disk.readahead import BUFFERS, Range, ReadAhead
from veneer.disk.tensors import Tensors
from veneer.errors import ConfigError, ModelError
from veneer.models.blocks import blocks_of
from veneer.storage import Storage
from veneer.storage.layers import Stored

SMALL = 4096
"""Bytes; smaller tensors stay in memory."""

Home = tuple[Storage, str, Range]
"""A storage, the name of one of its buffers, and where that lies on disk."""


def page_weights_(
    model: nn.Module,
    files: Tensors,
    homes: Mapping[str, str],
    *,
    buffers: int = BUFFERS,
    say: Callable[[str], None] = lambda _: None,
) -> ReadAhead:
    """Page the weights of every block whose storages are mapped from `files`.

    homes    module path -> its weight's name in the files
    Raises ModelError if the model has no blocks with weights that are.
    """
    parts = [part for path, block in blocks_of(model).items() if (part := _of_block(path, block, files, homes))]
    if not parts:
        raise ModelError(
            f"{type(model).__name__} has no blocks whose weights are quantized as they lie in files; "
            "set memory.page_weights to false"
        )
    reader = ReadAhead([[r for _, _, r in part] for part in parts], buffers, say)
    for number, part in enumerate(parts):
        storages = {id(storage): storage for storage, _, _ in part}
        on_disk = {key: _as_it_lies(storage) for key, storage in storages.items()}
        for storage, name, where in part:
            old = storage.get_buffer(name)
            setattr(storage, name, reader.view(number, where).view(old.dtype).view(old.shape))
        for key, storage in storages.items():
            storage.moved()
            _guard_(storage, on_disk[key], reader, number)
    return reader


def _of_block(path: str, block: nn.Module, files: Tensors, homes: Mapping[str, str]) -> list[Home]:
    found: list[Home] = []
    for inner, module in block.named_modules():
        home = homes.get(f"{path}.{inner}")
        if home is None or not isinstance(module, Stored):
            continue
        for key, tensor in module.storage.tensors(home).items():
            if key not in files or tensor.nbytes < SMALL:
                continue
            where = Range(files[key].file, files[key].start, files[key].nbytes)
            found += [
                (module.storage, name, where)
                for name, buffer in module.storage.named_buffers()
                if (buffer.data_ptr(), buffer.nbytes) == (tensor.data_ptr(), where.nbytes)
                and where.start % buffer.itemsize == 0
            ]
    return found


def _as_it_lies(storage: Storage) -> Storage:
    """The same storage over the mapped file: for who looks at a few numbers (fingerprints) or writes it all out."""
    mapped = copy.copy(storage)
    mapped._buffers = dict(storage._buffers)
    return mapped


def _guard_(storage: Storage, on_disk: Storage, reader: ReadAhead, number: int) -> None:
    """Let every use of the weight wait for its block."""

    def waiting(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            reader.take(number, returns=torch.is_grad_enabled())
            return method(*args, **kwargs)

        return run

    def refuse(*_: Any) -> NoReturn:
        raise ConfigError("paged weights cannot be changed; set memory.page_weights to false")

    changed = {name: waiting(getattr(storage, name)) for name in ("matmul", "dense", "rows")}
    for name, method in (changed | {"tensors": on_disk.tensors, "put_": refuse, "take_": refuse}).items():
        setattr(storage, name, method)
    storage.read_ahead = True
