"""The nearest recipes that fit where one does not: each change alone, then one after the other, cheapest first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from veneer.errors import VeneerError
from veneer.plan.memory import Estimate, Room, estimate, has_matrices, verdict
from veneer.plan.meta_model import Plain
from veneer.plan.preflight import check_sound
from veneer.recipe.overrides import Changes, with_changes
from veneer.recipe.settings import NONE, Recipe
from veneer.train.job import Job, steps_of

MOST = 3
"""Recipes that are shown."""


@dataclass(frozen=True)
class Fit:
    """A changed recipe that fits."""

    changes: Changes
    found: Estimate

    @property
    def flags(self) -> str:
        """The changes as flags of `veneer train`."""
        return " ".join(f"--{key} {str(value).lower()}" for key, value in self.changes.items())


def nearest(recipe: Recipe, rows: Job, room: Room, runtime: int) -> list[Fit]:
    """At most `MOST` recipes that fit in `room`, the cheapest change first; empty if none was found.

    runtime    bytes that the process holds before the weights are read
    """
    fits: list[Fit] = []
    together: Changes = {}
    steps = list(_steps(recipe, rows))
    for change in steps:
        together |= change
        for changes in dict.fromkeys((_key(change), _key(together))):
            if len(fits) < MOST and dict(changes) not in [fit.changes for fit in fits]:
                fits += _tried(recipe, rows, room, runtime, dict(changes))
    return fits


def _key(changes: Changes) -> tuple[tuple[str, Any], ...]:
    return tuple(changes.items())


def _steps(recipe: Recipe, rows: Job) -> Iterator[Changes]:
    """Single changes by what they cost: nothing but some time first, then what alters the result, then the disk."""
    longest = max(map(len, rows.examples))
    tokens = recipe.train.micro_batch_tokens or max(recipe.train.max_length, 2048)
    tokens = min(tokens, recipe.train.tokens_per_step)
    if recipe.data.packing:
        while tokens // 2 >= longest:
            tokens //= 2
            yield {"train.micro_batch_tokens": tokens}
    if recipe.train.recompute is not True:
        yield {"train.recompute": True}
    plain = Plain.of(recipe)
    adamw = recipe.optimizer.name == "adamw"  # others have neither fewer bits nor paged state
    if adamw and recipe.optimizer.bits != 8 and (has_matrices(recipe) or recipe.prompt.name != NONE):
        yield {"optimizer.bits": 8}
    if plain.storage is None and not recipe.restarts.every:
        yield {"storage.name": "nf4"}
    if not recipe.memory.page_activations:
        yield {"train.recompute": True, "memory.page_activations": True}
    if not recipe.memory.page_weights and not recipe.restarts.every:
        quantized = {} if plain.storage is not None else {"storage.name": "nf4"}
        yield {**quantized, "train.recompute": True, "memory.page_weights": True}
    if adamw and recipe.optimizer.paged is not True:
        yield {"optimizer.paged": True}


def _tried(recipe: Recipe, rows: Job, room: Room, runtime: int, changes: Changes) -> list[Fit]:
    """One fit, or none."""
    try:
        other = with_changes(recipe, changes)
        order = steps_of(other, rows.examples)
        check_sound(other, rows, order)
        found = estimate(other, rows, order, runtime)
    except VeneerError:  # a change that this recipe cannot take
        return []
    return [] if verdict(found, room) else [Fit(changes, found)]
