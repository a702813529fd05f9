"""The model of a recipe without its weights: real modules, storages and deltas on torch's meta device."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.adapters.layer_view import layer_at
from veneer.adapters.targets import Targeting, all_matching, choose
from veneer.adapters.virtual_tokens import shape_of
from veneer.base.base import Base
from veneer.base.device import CPU
from veneer.base.load import FOUR_BITS
from veneer.base.quant_cache import is_quantized
from veneer.base.quantize import Quantizer, packed_names
from veneer.base.storage_config import BaseStorage, base_storage, computed_by_kernels, config_of
from veneer.disk.tensors import open_tensors
from veneer.errors import ModelError
from veneer.methods.base import METHODS, MethodConfig, config_from
from veneer.models.blocks import blocks_of, output_head
from veneer.models.skeleton import build_skeleton, load_tokenizer
from veneer.models.sources import resolve
from veneer.plan.memory_tracker import Ledger
from veneer.plan.target_blocks import Places
from veneer.prompts import PROMPTS
from veneer.prompts.base import config_from as prompt_config
from veneer.recipe.settings import NONE, Recipe
from veneer.storage import Storage, StorageConfig, from_tensors
from veneer.storage.layers import Stored, store_weight
from veneer.train.compatibility import targeting_of
from veneer.train.setup import EIGHT_BITS


@dataclass(frozen=True)
class Plain:
    """The facts of a recipe's model that its files tell."""

    recipe: Recipe
    folder: Path

    @classmethod
    def of(cls, recipe: Recipe) -> "Plain":
        """Resolves the model; nothing but configuration and headers is read."""
        return cls(recipe, resolve(recipe.model))

    @cached_property
    def storage(self) -> BaseStorage | None:
        """How linear layers are kept: as the recipe says, or as a quantized folder has them."""
        asked = base_storage(self.recipe.storage.model_dump())
        if asked is not None or not is_quantized(self.folder):
            return asked
        tensors = open_tensors(self.folder)
        if not (packed := packed_names(tensors)):  # what config.json says is not so
            return None
        home, names = next(iter(packed.items()))
        return BaseStorage(config=config_of(from_tensors({n: tensors.map(n) for n in names}, home)))

    @property
    def by_kernels(self) -> str | None:
        """What veneer's C library is there for in this run; None for nothing."""
        if computed_by_kernels(self.storage):
            return FOUR_BITS
        return EIGHT_BITS if self.recipe.optimizer.bits == 8 else None

    def model(self, blocks: int | None = None) -> Any:
        """The model with its first so many blocks, or all, on the meta device; its layers in their storage.

        Raises ModelError for an architecture that cannot be built so.
        """
        dtype = CPU.dtype(self.recipe.train.dtype)
        model = build_skeleton(self.folder, dtype, blocks=blocks).to("meta")
        if self.storage is not None:
            with Ledger():
                Quantizer(self.storage, kept=_Once()).on_whole_model(model)
            for module in model.modules():
                if isinstance(module, Stored) and hasattr(module.storage, "_fast"):
                    object.__setattr__(module.storage, "_fast", _Never())
        return model.eval().requires_grad_(False)

    @cached_property
    def places(self) -> Places:
        """Where the whole model is changed."""
        model, prompt = self.model(), self.recipe.prompt.name != NONE or self._trains_whole_weights
        chosen = [] if self.recipe.method.name == NONE else self.targets(model)[1]
        return Places.of(list(blocks_of(model)), chosen, output_head(model), prompt=prompt)

    def _targeting(self, model: Any, alike: bool | None) -> Targeting:
        own, paths = targeting_of(self.recipe.method), list(blocks_of(model))
        if alike is None and len(paths) == self.places.blocks:
            return own
        if alike is not False and own == Targeting():  # all linear layers
            return own
        return self.places.in_(paths[:1] if alike is False else paths)

    def change(self, model: Any, alike: bool | None = None) -> Adapter:
        """The recipe's method, prompt or both on a model without weights, or with made ones.

        alike    whether each block is changed, as they are anywhere, or only the first; None is as the recipe says on a
                 whole model, and each block of one that has fewer
        """
        method, prompt = self.recipe.method, self.recipe.prompt
        config = None if method.name == NONE else config_from(method.name, method.own)
        targeting = Targeting() if config is None else self._targeting(model, alike)
        front = None if prompt.name == NONE else prompt_config(prompt.name, prompt.own)
        tokens, modules = self.recipe.tokens, [n for n in method.trained_modules if all_matching(model, (n,))]
        base = Base(model, load_tokenizer(self.folder) if tokens.add or tokens.train else None)
        with Ledger():  # `begun`: methods that look at data before they begin do not
            return attach(
                base,
                config,
                targeting,
                prompt=front,
                trained_modules=modules,
                new_tokens=tokens.add,
                trained_tokens=tokens.train,
                begun=[],
            )

    @property
    def _trains_whole_weights(self) -> bool:
        """Whether modules or rows of tokens are trained in full, so that gradients pass through all blocks."""
        tokens = self.recipe.tokens
        return bool(tokens.add or tokens.train or self.recipe.method.trained_modules)

    def targets(self, model: Any) -> tuple[MethodConfig, list[str]]:
        """The method's settings, and the paths of the whole model's layers that it changes."""
        method = self.recipe.method
        config = config_from(method.name, method.own)
        return config, choose(model, targeting_of(method), METHODS[config.method].kinds, config.method)

    def trained(self, model: Any) -> list[int]:
        """Numbers that are trained on each layer of the whole model, and in the prompt, by their closed forms."""
        prompt, counts = self.recipe.prompt, []
        if self.recipe.method.name != NONE:
            config, paths = self.targets(model)
            kind = METHODS[config.method]
            counts = [kind.n_params(layer_at(model, path), config.at(path)) for path in paths]
        if self._trains_whole_weights:
            adapter = self.change(self.model())
            counts = [n.parameter.numel() for n in adapter.named() if n.place != "prompt"]
        if prompt.name != NONE:
            settings = prompt_config(prompt.name, prompt.own)
            counts.append(PROMPTS[settings.kind].n_params(shape_of(model), settings))
        return counts


class _Once:
    """Keeps weights without data: one of each shape is really quantized, the others get copies of their own."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Storage] = {}

    def __call__(self, w: Tensor, config: StorageConfig, name: str) -> Storage:
        first = self._made.get(key := (*w.shape, w.dtype))
        if first is None:
            return self._made.setdefault(key, store_weight(w, config, name))
        other = copy.copy(first)
        other._buffers = {n: b if b is None else b.new_empty(b.shape) for n, b in first._buffers.items()}
        return other


class _Never:
    """In the place of a weight made ready for the C library: there is no weight."""

    def accepts(self, x: Any) -> bool:
        return False


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    found = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers()]
    }
    return sum(found.values())


def base_bytes(model: Any) -> dict[str, int]:
    """Bytes of the base: those of its blocks and those of the rest (embeddings, head, norms)."""
    blocks = list(blocks_of(model).values())
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no blocks that are known here, so its memory cannot be foreseen")
    inside = sum(map(tensor_bytes, blocks))
    return {"blocks": inside, "rest": tensor_bytes(model) - inside, "largest block": max(map(tensor_bytes, blocks))}


def largest_tensor(model: Any, folder: Path) -> int:
    """Bytes of the largest tensor in the files, and of its copy in the compute dtype where that is another."""
    largest = max(open_tensors(folder).values(), key=lambda e: e.nbytes)
    same = not largest.dtype.is_floating_point or largest.dtype == model.dtype
    return largest.nbytes if same else largest.nbytes + largest.nbytes // largest.dtype.itemsize * model.dtype.itemsize
