"""What the plan reads from the meta model: bytes of its parts, its files, and which blocks the adapter targets."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.targets import Targeting
from veneer.base.base import Base
from veneer.base.meta import shortened
from veneer.base.quant_cache import cache_folder, check_cached, is_quantized
from veneer.disk.tensors import open_tensors, weight_files
from veneer.errors import DiskError, ModelError
from veneer.recipe.settings import NONE
from veneer.train.preflight import Checked, attach_without_data, targeting_of


@dataclass(frozen=True)
class TargetBlocks:
    """What the adapter targets, by block, so that a few blocks can stand for the whole model."""

    blocks: int
    """Blocks of the whole model."""
    changed: frozenset[int]
    """Numbers of the blocks with a target."""
    inside: tuple[str, ...]
    """Targets in any of them, by path within the block."""
    outside: tuple[str, ...]
    """Targets elsewhere, by path."""
    first: int
    """The first block that gradients pass through; those before it keep nothing for the backward pass."""

    @classmethod
    def of(cls, checked: Checked) -> "TargetBlocks":
        """Those of a job's adapter.  Raises Untraceable if it cannot be made on the meta device."""
        base, inside, outside, changed = checked.meta, {}, [], set[int]()
        blocks = list(base.blocks)
        for path in checked.adapter.deltas:
            number = next((i for i, b in enumerate(blocks) if path == b or path.startswith(f"{b}.")), None)
            if number is None:
                outside.append(path)
            else:
                changed.add(number)
                inside[path.removeprefix(blocks[number]).removeprefix(".")] = True
        recipe = checked.recipe
        whole = recipe.tokens.add or recipe.tokens.train or recipe.method.trained_modules
        beside = whole or recipe.prompt.name != NONE  # virtual tokens, embeddings: gradients pass through all blocks
        to_the_input = beside or any(path != base.head_path for path in outside)
        first = 0 if to_the_input else min(changed, default=len(blocks))
        return cls(len(blocks), frozenset(changed), tuple(inside), tuple(outside), first)

    def targeted(self, block: int) -> bool:
        """Whether the block of this number has a target; blocks beyond the last count as if they had."""
        return block in self.changed or block >= self.blocks

    def targeting(self, blocks: list[str]) -> Targeting:
        """The same targets in each of these blocks."""
        paths = [f"{b}.{inner}" if inner else b for b in blocks for inner in self.inside] + list(self.outside)
        return Targeting(targets="|".join(re.escape(path) for path in paths))


def short_model(checked: Checked, count: int, *, all_targeted: bool = True) -> tuple[Base, Adapter]:
    """The first `count` blocks on the meta device with the job's adapter attached.

    all_targeted   every block has the targets that any block of the whole model has; else only the first
    """
    base = shortened(checked.meta, count)
    return base, attach_to_few(checked, base, all_targeted=all_targeted)


def attach_to_few(checked: Checked, base: Base, *, all_targeted: bool = True) -> Adapter:
    """Attach the job's adapter to a base with only a few blocks, as `short_model` says."""
    targeting = targeting_of(checked.recipe.method)
    if not all_targeted or targeting != Targeting():
        paths = list(base.blocks)
        targeting = TargetBlocks.of(checked).targeting(paths if all_targeted else paths[:1])
    return attach_without_data(base, checked.recipe, targeting)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared storage counts once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def base_bytes(base: Base) -> dict[str, int]:
    """Bytes of the base: those of its blocks, and those of the rest (embeddings, head, norms)."""
    blocks = list(base.blocks.values())
    if not blocks:
        raise ModelError(f"{base.kind} has no transformer blocks known to veneer, so its memory cannot be estimated")
    sizes = list(map(tensor_bytes, blocks))
    return {"blocks": sum(sizes), "rest": tensor_bytes(base.network) - sum(sizes), "largest block": max(sizes)}


def largest_tensor(base: Base) -> int:
    """Bytes of the largest tensor in the files, and of its copy in the compute dtype if that is another."""
    largest = max(open_tensors(base.files).values(), key=lambda e: e.nbytes)
    same = not largest.dtype.is_floating_point or largest.dtype == base.dtype
    return largest.nbytes if same else largest.nbytes + largest.nbytes // largest.dtype.itemsize * base.dtype.itemsize


def files_to_load(checked: Checked) -> tuple[list[Path], bool]:
    """The weight files that will be read, and whether their weights are still to be quantized."""
    storage, folder = checked.storage, checked.meta.files
    if storage is None or is_quantized(folder):
        return weight_files(folder), False
    cached = cache_folder(folder, storage)
    try:
        check_cached(cached)
    except DiskError:  # absent, or to be made anew
        return weight_files(folder), True
    return weight_files(cached), False
