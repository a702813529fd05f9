"""Where in the whole model a recipe's method acts, so that a few blocks can stand for all of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.adapters.targets import Targeting


@dataclass(frozen=True)
class Places:
    """What is changed, by block."""

    blocks: int
    """Of the whole model."""
    changed: frozenset[int]
    """The blocks in which anything is changed."""
    inside: tuple[str, ...]
    """What is changed in any of them, by its path within a block."""
    outside: tuple[str, ...]
    """What is changed elsewhere, by its path."""
    first: int
    """The first block that gradients pass through; those before it keep nothing for the backward pass."""

    @classmethod
    def of(cls, blocks: Sequence[str], chosen: Sequence[str], head: str | None, *, prompt: bool) -> "Places":
        """From the paths of the blocks, of what is changed, and of the output head.

        prompt    whether something is trained in front of the blocks
        """
        inside, outside, changed = {}, [], set()
        for path in chosen:
            number = next((i for i, b in enumerate(blocks) if path == b or path.startswith(f"{b}.")), None)
            if number is None:
                outside.append(path)
            else:
                changed.add(number)
                inside[path.removeprefix(blocks[number]).removeprefix(".")] = True
        behind = all(path == head for path in outside) and not prompt
        first = min(changed, default=len(blocks)) if behind else 0
        return cls(len(blocks), frozenset(changed), tuple(inside), tuple(outside), first)

    def changes(self, block: int) -> bool:
        """Whether anything in the block of this number is changed; blocks that the model does not have are."""
        return block in self.changed or block >= self.blocks

    def in_(self, blocks: Sequence[str]) -> Targeting:
        """What is changed where these blocks are, each of them changed."""
        paths = [f"{b}.{inner}" if inner else b for b in blocks for inner in self.inside] + list(self.outside)
        return Targeting(targets="|".join(re.escape(path) for path in paths))
