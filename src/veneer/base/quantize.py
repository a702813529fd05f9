"""Load a base model with its weights kept in a storage: quantized as they are read, or as a folder holds them.

Quantizing reads one weight at a time, in its file's own number type, so that the codes do not depend on what a machine
computes in; peak memory is the quantized model and one tensor. What was quantized is written once into veneer's cache,
under a hash of the base's files and the settings, and mapped from there by the next start, without a copy. Paged
weights go to disk one by one as they are quantized, and are read from the cache a block at a time, ahead of use.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer import machine
from veneer.base.quant_cache import cache_folder, cache_quantized, check_cached, is_quantized
from veneer.base.storage_config import BaseStorage, computed_by_kernels, config_of, storage_of
from veneer.base.weight_paging import page_weights_
from veneer.disk.atomic import clear_leftovers
from veneer.disk.scratch import Spill, refuse_memory
from veneer.disk.tensors import Tensors, open_tensors
from veneer.errors import ConfigError, DiskError, ModelError
from veneer.kernels import native
from veneer.models.blocks import output_head
from veneer.models.load import Loaded, load_model, resolve
from veneer.storage import STORAGES, Storage, from_tensors
from veneer.storage.fourbit import FourBit
from veneer.storage.int8 import Int8
from veneer.storage.layers import Keep, StoredEmbedding, StoredLinear, keep, store_

Progress = Callable[[int, int], None]
FOUR_BITS = "with 4-bit weights"
Seen = Callable[[str, Tensor, Storage], None]
Say = Callable[[str], None]


def load_base(
    model: str | Path,
    *,
    storage: BaseStorage | None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    paged: bool = False,
    say: Say = lambda _: None,
) -> Loaded:
    """Load `model` as `veneer.models.load.load_model` does, its linear layers kept in `storage`.

    storage   None leaves every weight as the files have it.  A folder that is quantized already stays as it is; asking
              for another storage than its own is an error
    paged     read the quantized weights of the model's blocks from disk ahead of each use (base/weight_paging.py)
    say       is told what takes a while
    Raises ModelError and ConfigError, as load_model and the storage do, with every weight that cannot be used.
    """
    folder = resolve(model)
    if paged and torch.device(device).type != "cpu":
        raise ConfigError(f"memory.page_weights reads weights for a CPU, not for {device}; set it to false")
    if paged and storage is None and not is_quantized(folder):
        raise dense_paged(model)
    if paged:
        refuse_weights_in_memory(folder)
    if torch.device(device).type == "cpu" and computed_by_kernels(storage):
        native.say_without(FOUR_BITS, say)
    furnisher, base = Furnisher(storage), folder
    if storage is None or is_quantized(folder):
        loaded = load_model(folder, dtype=dtype, furnish=furnisher, device=device)
    else:
        base = cache_folder(folder, storage)
        if not base.is_dir() or (found := _from_cache(base, furnisher, dtype, device, say)) is None:
            clear_leftovers(base.parent)
            say(f"quantizing {model} to {storage} (once)")
            found = (_through_disk if paged else _quantized)(folder, base, furnisher, dtype, device, say)
        loaded = found
    ready_(loaded.model, storage, device)
    if storage is None and torch.device(device).type == "cpu" and computed_by_kernels(storage_of(loaded.model)):
        native.say_without(FOUR_BITS, say)
    loaded = replace(loaded, name=str(model), path=folder)
    if paged:
        page_weights_(loaded.model, open_tensors(base), furnisher.homes, say=say)
    return loaded


def dense_paged(model: str | Path) -> ConfigError:
    """For weights that are to be paged, and are not quantized."""
    return ConfigError(
        f"memory.page_weights reads weights as they are computed with, and {model} is dense; set storage to nf4, fp4 "
        "or int8, or memory.page_weights to false"
    )


def refuse_weights_in_memory(folder: Path) -> None:
    """Raise DiskError where the weights that are paged would be read from memory."""
    if is_quantized(folder):
        refuse_memory(folder, "memory.page_weights", "put the model on a disk")
    else:
        refuse_memory(machine.cache_dir(), "memory.page_weights", "set VENEER_CACHE to a folder on a disk")


def _from_cache(
    cached: Path, furnisher: "Furnisher", dtype: str | torch.dtype, device: str | torch.device, say: Say
) -> Loaded | None:
    try:
        check_cached(cached)
        return load_model(cached, dtype=dtype, furnish=furnisher, device=device)
    except (ModelError, DiskError) as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[:2])
        say(f"the quantized weights in {cached} are damaged and made anew: {why}")
        return None


def _quantized(
    folder: Path, cached: Path, furnisher: "Furnisher", dtype: str | torch.dtype, device: str | torch.device, say: Say
) -> Loaded:
    """Quantize in memory, and keep that for the next start too."""
    loaded = load_model(folder, dtype=dtype, furnish=furnisher, device=device)
    if furnisher.homes:
        try:
            cache_quantized(folder, cached, furnisher)
        except DiskError as error:
            say(f"the quantized weights are not kept for the next start: {error}")
    return loaded


def _through_disk(
    folder: Path, cached: Path, furnisher: "Furnisher", dtype: str | torch.dtype, device: str | torch.device, say: Say
) -> Loaded:
    """Quantize into the cache, each weight to disk as soon as it is done, and load from there."""
    with Spill(cached.parent) as spill:
        load_model(folder, dtype=dtype, furnish=(made := Furnisher(furnisher.storage, spill=spill)))
        if made.homes:
            cache_quantized(folder, cached, made)
    return load_model(cached if made.homes else folder, dtype=dtype, furnish=furnisher, device=device)


def ready_(model: nn.Module, storage: BaseStorage | None, device: str | torch.device) -> None:
    """Stored weights on `device`, computed with by the kernels that `storage` names."""
    for path, module in model.named_modules():
        if isinstance(module, Storage):
            module.to(device)
        if isinstance(module, FourBit) and storage is not None:
            module.compute_with(storage.backend, path.removesuffix(".storage"))


class Furnisher:
    """Puts stored layers into a model without weights: those its files hold quantized, else those to quantize now.

    storage    None only takes what is quantized in the files
    seen       is shown each weight (O, D) and what it was quantized to
    progress   is told how many weights of how many are done
    spill      takes what is quantized out of memory
    kept       makes each storage of a whole model
    """

    def __init__(
        self,
        storage: BaseStorage | None,
        *,
        seen: Seen = lambda path, w, kept: None,
        progress: Progress = lambda done, total: None,
        spill: Spill | None = None,
        kept: Keep = keep,
    ) -> None:
        self.storage, self._seen, self._progress, self._spill, self._keep = storage, seen, progress, spill, kept
        self.kept: dict[str, Storage] = {}
        """By module path."""
        self.homes: dict[str, str] = {}
        """Module path -> its weight's name in the files; empty where transformers had to rearrange them."""
        self.dense: list[str] = []
        """Linear layers that stay dense."""
        self.copies: list[str] = []
        """Names in the files of a head whose weight is that of a stored embedding."""

    def __call__(self, model: Any, tensors: Tensors) -> Tensors:
        self.kept, self.homes = {}, {}
        if not tensors:
            return self._on_a_whole_model(model, tensors)
        packed = packed_names(tensors)
        every = _layers(model)
        if packed:
            homes = {path: home for path in every if (home := stored_name(model, f"{path}.weight", packed))}
            used = self._read(homes, packed, tensors, every)
        else:
            targets = self._targets(model, tensors)
            homes = {path: home for path in targets if (home := _fitting(model, tensors, path))}
            used = self._quantize(homes, tensors, every)
        self.copies = _install(model, self.kept, tensors)
        self.homes = homes
        self.dense = [p for p, m in every.items() if p not in self.kept and not isinstance(m, nn.Embedding)]
        return tensors.without([*used, *self.copies])

    def _on_a_whole_model(self, model: Any, tensors: Tensors) -> Tensors:
        if self.storage is not None:
            store_(model, self.storage.config, self._targets(model, tensors), self._keep)
        return tensors

    def _targets(self, model: Any, tensors: Tensors) -> list[str]:
        """Paths of the layers to quantize.  Raises ConfigError where the choice does not fit the model."""
        if self.storage is None:
            return []
        head, embedding = output_head(model), _input_embedding(model)
        tied = _tied(model, tensors)
        if tied and self.storage.head and not self.storage.embeddings:
            raise ConfigError(
                "storage.head is true, but this model's output head is its input embedding; set storage.embeddings "
                "to keep both quantized, or neither"
            )
        left = {head} if tied or not self.storage.head else set()
        if not self.storage.embeddings:
            left.add(embedding)
        elif tied and not tensors:  # store_ lets a head go along with its embedding, as _install does
            left = set()
        return [path for path in _layers(model) if path not in left and not _stays_wide(model, path)]

    def _quantize(self, homes: dict[str, str], tensors: Tensors, layers: dict[str, nn.Module]) -> list[str]:
        problems = []
        for done, (path, home) in enumerate(homes.items(), start=1):
            assert self.storage is not None
            w = tensors.read(home)
            w = w.T.contiguous() if isinstance(layers[path], Conv1D) else w
            try:
                self.kept[path] = STORAGES[self.storage.config.storage].of(w, self.storage.config, home)
            except ModelError as error:
                problems.append(str(error))
                continue
            self._seen(path, w, self.kept[path])
            if self._spill is not None:
                for name, buffer in self.kept[path].named_buffers():
                    setattr(self.kept[path], name, self._spill.put(buffer))
                self.kept[path].moved()
            del w
            machine.trim_memory()  # the heap would keep it in pieces, between what is kept
            self._progress(done, len(homes))
        if problems:
            raise ModelError("\n".join([f"{len(problems)} weights cannot be quantized:", *_listed(problems)]))
        return list(homes.values())

    def _read(
        self, homes: dict[str, str], packed: dict[str, list[str]], tensors: Tensors, layers: dict[str, nn.Module]
    ) -> list[str]:
        problems, plain = [], _plain_dtype(tensors, packed)
        for path, home in homes.items():
            try:
                kept = from_tensors({name: tensors.map(name) for name in packed[home]}, home)
            except ModelError as error:
                problems.append(str(error).removesuffix("\nNothing was loaded."))
                continue
            wanted, asked = _shape(layers[path]), self.storage.config if self.storage is not None else None
            if kept.shape != wanted:
                problems.append(f"{home}: {kept.shape} in the files, {wanted} in the model")
            elif asked is not None and config_of(kept) != asked:
                problems.append(f"{home} is kept as {_named(config_of(kept))} already, asked for is {_named(asked)}")
            if isinstance(kept, Int8):  # whose layout does not say what it was made from
                kept.dtype = plain
            self.kept[path] = kept
        if problems:
            raise ModelError(
                "\n".join(["these quantized weights cannot be used:", *_listed(problems), "Nothing was loaded."])
            )
        return [name for home in homes.values() for name in packed[home]]


def stored_name(model: Any, name: str, names: Any) -> str | None:
    """The name in the files of a parameter of the model; the base model's prefix may be there or not."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)


def packed_names(tensors: Tensors) -> dict[str, list[str]]:
    """Weights that the files hold quantized -> the names of all their tensors, those that are there."""
    found: dict[str, list[str]] = {}
    for name, entry in tensors.items():
        inner, at, _ = name.partition(".weight.")
        module, _, leaf = name.rpartition(".")
        if at:
            found.setdefault(f"{inner}.weight", []).append(name)
        elif leaf in ("SCB", "weight_format"):
            found.setdefault(f"{module}.weight", []).append(name)
        elif leaf == "weight" and not entry.dtype.is_floating_point:
            found.setdefault(name, [])
    for home, names in found.items():
        if home in tensors:
            names.insert(0, home)
    return found


def _plain_dtype(tensors: Tensors, packed: dict[str, list[str]]) -> torch.dtype:
    """The number type of the files' other weights; bitsandbytes' float16 where there are none."""
    parts = {name for names in packed.values() for name in names}
    plain = (entry.dtype for name, entry in tensors.items() if name not in parts and entry.dtype.is_floating_point)
    return next(plain, torch.float16)


def _layers(model: Any) -> dict[str, nn.Module]:
    """Layers that can be kept in a storage: linear ones as they come from torch, Conv1D, and the input embedding."""
    embedding = _input_embedding(model)
    return {
        path: m
        for path, m in model.named_modules()
        if type(m) is nn.Linear or isinstance(m, Conv1D) or (path == embedding and isinstance(m, nn.Embedding))
    }


def _input_embedding(model: Any) -> str | None:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return next((str(path) for path, m in model.named_modules() if m is embedding), None)


def _tied(model: Any, tensors: Tensors) -> bool:
    """Whether the output head's weight is the input embedding's, in the model and in the files."""
    head, embedding = output_head(model), _input_embedding(model)
    if head is None or embedding is None:
        return False
    if model.get_submodule(head).weight is not model.get_submodule(embedding).weight:
        return False
    names = [stored_name(model, f"{path}.weight", tensors) for path in (head, embedding)]
    if names[0] is None or names[1] is None:
        return True
    one, other = tensors[names[0]], tensors[names[1]]
    if (one.dtype, one.shape) != (other.dtype, other.shape):  # a quantized embedding: a head written beside it differs
        return False
    return torch.equal(tensors.read(names[0]), tensors.read(names[1]))


def _stays_wide(model: Any, path: str) -> bool:
    """Whether transformers keeps this layer in float32, quantized or not."""
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return any(part in names for part in path.split("."))


def _fitting(model: Any, tensors: Tensors, path: str) -> str | None:
    """A weight's name in the files; None if it is missing or of another shape, which loading the rest reports."""
    home = stored_name(model, f"{path}.weight", tensors)
    shape = tuple(model.get_submodule(path).weight.shape)
    return home if home is not None and tensors[home].shape == shape else None


def _shape(layer: nn.Module) -> tuple[int, int]:
    """O and D; V and D for an embedding."""
    a, b = layer.get_parameter("weight").shape
    return (b, a) if isinstance(layer, Conv1D) else (a, b)


def _install(model: Any, kept: dict[str, Storage], tensors: Tensors) -> list[str]:
    """Put a layer around each storage into the model; returns names in the files of a head that went along."""
    head, embedding = output_head(model), _input_embedding(model)
    copies = []
    if embedding in kept and head is not None and head not in kept and _tied(model, tensors):
        copies = [name for name in [stored_name(model, f"{head}.weight", tensors)] if name is not None]
        _put(model, head, StoredLinear(kept[str(embedding)], model.get_submodule(head).bias, saved=False))
    for path, storage in kept.items():
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Embedding):
            _put(model, path, StoredEmbedding.holding(storage, layer, f"{path}.weight"))
        else:
            _put(model, path, StoredLinear.holding(storage, layer))
    return copies


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    layer.train(model.training)
    setattr(model.get_submodule(parent), leaf, layer)


def _listed(problems: list[str], most: int = 8) -> Iterator[str]:
    for problem in problems[:most]:
        yield from (f"  {line}" for line in problem.splitlines())
    if len(problems) > most:
        yield f"  ... and {len(problems) - most} more"


def _named(config: Any) -> str:
    return str(BaseStorage(config=config))
