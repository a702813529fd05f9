"""Load a base model: resolve -> skeleton -> place storage -> fill -> ready; peak memory is the model and one tensor."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from veneer import machine
from veneer.base.base import Base
from veneer.base.device import Device, find_device
from veneer.base.fill import fill_, load_through_transformers, rearranged_by_transformers
from veneer.base.quant_cache import cache_quantized, is_quantized, quantize_into_cache, sealed_copy
from veneer.base.quantize import Quantizer
from veneer.base.storage_config import BaseStorage, base_storage, computed_by_kernels
from veneer.base.weight_paging import page_weights_
from veneer.disk.model_dir import open_model_dir
from veneer.disk.scratch import refuse_memory
from veneer.disk.tensors import open_tensors
from veneer.errors import ConfigError, DiskError, ModelError
from veneer.kernels import native
from veneer.models.skeleton import build_skeleton, load_tokenizer, quiet, set_generation_config
from veneer.models.sources import resolve
from veneer.storage import Storage, bnb
from veneer.storage.fourbit import FourBit

FOUR_BITS = "with 4-bit weights"
Say = Callable[[str], None]


def load_model(
    name: str | Path,
    *,
    storage: str | Mapping[str, Any] | BaseStorage | None = "dense",
    device: str | torch.device | Device = "auto",
    dtype: str | torch.dtype = "auto",
    paged: bool = False,
    say: Say = lambda _: None,
) -> Base:
    """Load `name` (an alias, a hub id, a folder or a .gguf file), frozen, with its tokenizer.

    storage   how linear layers are stored, as a recipe says it: "nf4", {"name": "nf4", "double_quant": True}, ...
              "dense" leaves every weight as the files have it; a folder that is quantized already stays so
    device    "auto" (CUDA if there is any), "cpu", "cuda:1", "mps"
    dtype     "auto" (the faster one here), "float32", "bfloat16", "float16", or a torch dtype
    paged     read the quantized weights of the blocks from disk ahead of each use (base/weight_paging.py)
    say       is told what takes a while
    Raises ModelError (not found, not complete, tensors missing or unexpected) and ConfigError (unknown names and
    settings, another storage than the folder's own).
    """
    kept = storage if isinstance(storage, BaseStorage | None) else base_storage(storage)
    where, folder = find_device(device), resolve(name)
    open_model_dir(folder)
    if paged:
        refuse_paging(str(name), folder, kept, where)
    if where.is_cpu and computed_by_kernels(kept):
        native.say_without(FOUR_BITS, say)
    source, fresh = _stored_copy(str(name), folder, kept, paged, say)
    quantizer = Quantizer(kept)
    with quiet():
        network = _filled(source, where.dtype(dtype), quantizer, where)
        set_generation_config(network, source)
        tokenizer = load_tokenizer(source)
    network.eval().requires_grad_(False)
    compute_with_(network, kept, where)
    base = Base(network, tokenizer, str(name), folder, where)
    if fresh is not None and quantizer.homes:
        _keep_copy(folder, fresh, quantizer, say)
    if kept is None and where.is_cpu and computed_by_kernels(base.storage):
        native.say_without(FOUR_BITS, say)
    if paged:
        page_weights_(network, open_tensors(source), quantizer.homes, say=say)
    return base


def refuse_paging(name: str, folder: Path, storage: BaseStorage | None, device: Device) -> None:
    """Raise ConfigError or DiskError where the weights of the blocks cannot be read from disk ahead of use."""
    if not device.is_cpu:
        raise ConfigError(f"memory.page_weights reads weights for a CPU, not for {device}; set it to false")
    if is_quantized(folder):
        refuse_memory(folder, "memory.page_weights", "put the model on a disk")
        return
    if storage is None:
        raise ConfigError(
            f"memory.page_weights reads weights as they are computed with, and {name} is dense; set storage to nf4, "
            "fp4 or int8, or memory.page_weights to false"
        )
    refuse_memory(machine.cache_dir(), "memory.page_weights", "set VENEER_CACHE to a folder on a disk")


def compute_with_(network: Any, storage: BaseStorage | None, device: Device) -> None:
    """Put stored weights on `device` and choose the kernels that `storage` names; auto: the faster ones there."""
    backend: bnb.Backend = "auto" if storage is None else storage.backend
    if backend == "auto" and device.runs_bitsandbytes and bnb.installed():
        backend = "bitsandbytes"
    for path, module in network.named_modules():
        if isinstance(module, Storage):
            module.to(device.torch_device)
        if isinstance(module, FourBit):
            module.compute_with(backend, path.removesuffix(".storage"))


def _stored_copy(
    name: str, folder: Path, storage: BaseStorage | None, paged: bool, say: Say
) -> tuple[Path, Path | None]:
    """The folder whose weights are loaded, and where to keep a quantized copy that is made while loading, if one is."""
    if storage is None or is_quantized(folder):
        return folder, None
    cached, whole = sealed_copy(folder, storage, say)
    if whole:
        return cached, None
    say(f"quantizing {name} to {storage} (once)")
    if not paged:
        return folder, cached
    return (cached if quantize_into_cache(folder, cached, storage) else folder), None


def _filled(source: Path, dtype: torch.dtype, quantizer: Quantizer, device: Device) -> Any:
    """The skeleton with its storage placed and every weight read."""
    network, tensors = build_skeleton(source, dtype), open_tensors(source)
    kind = type(network)
    try:
        fill_(network, quantizer(network, tensors), device)
    except ModelError:
        if is_quantized(source) or not rearranged_by_transformers(network):
            raise
        network = load_through_transformers(kind, source, dtype, device)
        quantizer.on_whole_model(network)
    return network


def _keep_copy(folder: Path, cached: Path, quantizer: Quantizer, say: Say) -> None:
    try:
        cache_quantized(folder, cached, quantizer)
    except DiskError as error:
        say(f"the quantized weights are not kept for the next start: {error}")
