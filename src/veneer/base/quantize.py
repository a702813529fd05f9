"""Place quantized weights in a network without weights: quantized as they are read, or as a folder holds them.

Quantizing reads one weight at a time, in its file's own number type, so that the codes do not depend on the compute
dtype of a machine; peak memory is the quantized model and one tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer import machine
from veneer.base.device import CPU, Device
from veneer.base.storage_config import BaseStorage, config_of
from veneer.disk.scratch import DiskBuffer
from veneer.disk.tensors import Tensors
from veneer.errors import ConfigError, ModelError, listed
from veneer.models.blocks import input_embedding, name_in_files, output_head
from veneer.storage import STORAGES, Storage, from_tensors
from veneer.storage.int8 import Int8
from veneer.storage.layers import StoredEmbedding, StoredLinear, StoreWeight, store_, store_weight

OnProgress = Callable[[int, int], None]
Seen = Callable[[str, Tensor, Storage], None]


class Quantizer:
    """Puts stored layers into a model without weights: those its files hold quantized, else those to quantize now.

    storage    None only takes what is quantized in the files
    seen       is shown each weight (O, D) and what it was quantized to
    progress   is told how many weights of how many are done
    spill      takes what is quantized out of memory
    kept       makes each storage of a whole model
    device     quantizes what is read from files, and keeps it
    """

    def __init__(
        self,
        storage: BaseStorage | None,
        *,
        seen: Seen = lambda path, w, kept: None,
        progress: OnProgress = lambda done, total: None,
        spill: DiskBuffer | None = None,
        kept: StoreWeight = store_weight,
        device: Device = CPU,
    ) -> None:
        self.device = device
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
        packed = packed_names(tensors)
        every = _layers(model)
        if packed:
            homes = {path: home for path in every if (home := name_in_files(model, f"{path}.weight", packed))}
            used = self._read(homes, packed, tensors, every)
        else:
            targets = self._targets(model, tensors)
            homes = {path: home for path in targets if (home := _fitting(model, tensors, path))}
            used = self._quantize(homes, tensors, every)
        self.copies = _install(model, self.kept, tensors)
        self.homes = homes
        self.dense = [p for p, m in every.items() if p not in self.kept and not isinstance(m, nn.Embedding)]
        return tensors.without([*used, *self.copies])

    def on_whole_model(self, model: Any) -> None:
        """Store the layers of a model that has its weights already, or of one on the meta device."""
        if self.storage is not None:
            store_(model, self.storage.config, self._targets(model, Tensors({}, {})), self._keep)

    def _targets(self, model: Any, tensors: Tensors) -> list[str]:
        """Paths of the layers to quantize.  Raises ConfigError where the choice does not fit the model."""
        if self.storage is None:
            return []
        head, embedding = output_head(model), input_embedding(model)
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
            w = tensors.read(home).to(self.device.torch_device)
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
            raise ModelError(f"{len(problems)} weights cannot be quantized:\n{listed(problems)}")
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
            raise ModelError(f"these quantized weights cannot be used:\n{listed(problems)}\nNothing was loaded.")
        return [name for home in homes.values() for name in packed[home]]


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
    embedding = input_embedding(model)
    return {
        path: m
        for path, m in model.named_modules()
        if type(m) is nn.Linear or isinstance(m, Conv1D) or (path == embedding and isinstance(m, nn.Embedding))
    }


def _tied(model: Any, tensors: Tensors) -> bool:
    """Whether the output head's weight is the input embedding's, in the model and in the files."""
    head, embedding = output_head(model), input_embedding(model)
    if head is None or embedding is None:
        return False
    if model.get_submodule(head).weight is not model.get_submodule(embedding).weight:
        return False
    names = [name_in_files(model, f"{path}.weight", tensors) for path in (head, embedding)]
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
    home = name_in_files(model, f"{path}.weight", tensors)
    shape = tuple(model.get_submodule(path).weight.shape)
    return home if home is not None and tensors[home].shape == shape else None


def _shape(layer: nn.Module) -> tuple[int, int]:
    """O and D; V and D for an embedding."""
    a, b = layer.get_parameter("weight").shape
    return (b, a) if isinstance(layer, Conv1D) else (a, b)


def _install(model: Any, kept: dict[str, Storage], tensors: Tensors) -> list[str]:
    """Put a layer around each storage into the model; returns names in the files of a head that went along."""
    head, embedding = output_head(model), input_embedding(model)
    copies = []
    if embedding in kept and head is not None and head not in kept and _tied(model, tensors):
        copies = [name for name in [name_in_files(model, f"{head}.weight", tensors)] if name is not None]
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


def _named(config: Any) -> str:
    return str(BaseStorage(config=config))
