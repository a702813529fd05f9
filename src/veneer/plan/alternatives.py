"""The nearest recipes that fit, when one does not: each change alone, then added to those before it, cheapest first."""

from collections.abc import Iterator
from dataclasses import dataclass

from veneer.errors import VeneerError
from veneer.plan.memory import Estimate, estimate, has_matrices
from veneer.plan.room import Room, verdict
from veneer.recipe.overrides import Changes, with_changes
from veneer.recipe.settings import NONE
from veneer.train.preflight import Checked, preflight

MOST = 3
"""Recipes that are shown."""


@dataclass(frozen=True)
class Fit:
    """A changed recipe that fits."""

    changes: Changes
    found: Estimate
    checked: Checked

    @property
    def flags(self) -> str:
        """The changes as flags of `veneer train`."""
        return " ".join(f"--{key} {str(value).lower()}" for key, value in self.changes.items())


def nearest(checked: Checked, room: Room, runtime: int) -> list[Fit]:
    """At most `MOST` recipes that fit in `room`, the cheapest change first; empty if none was found.

    runtime    resident bytes of the process before the weights are read
    """
    fits: list[Fit] = []
    tried: list[Changes] = []
    together: Changes = {}
    earlier = [checked]
    for change in possible_changes(checked):
        together |= change
        for changes in (change, dict(together)):
            if len(fits) < MOST and changes not in tried:
                tried.append(changes)
                fits += _tried(earlier, room, runtime, changes)
    return fits


def possible_changes(checked: Checked) -> Iterator[Changes]:
    """Single changes by cost: first those that only take time, then what alters the result, then the disk."""
    recipe = checked.recipe
    longest = max(map(len, checked.job.examples))
    tokens = recipe.train.micro_batch_tokens or max(recipe.train.max_length, 2048)
    tokens = min(tokens, recipe.train.tokens_per_step)
    if recipe.data.packing:
        while tokens // 2 >= longest:
            tokens //= 2
            yield {"train.micro_batch_tokens": tokens}
    if recipe.train.recompute is not True:
        yield {"train.recompute": True}
    adamw = recipe.optimizer.name == "adamw"  # others have neither fewer bits nor paged state
    if adamw and recipe.optimizer.bits != 8 and (has_matrices(recipe) or recipe.prompt.name != NONE):
        yield {"optimizer.bits": 8}
    quantized = {} if checked.storage is not None else {"storage.name": "nf4"}
    if quantized and not recipe.restarts.every:
        yield quantized
    if not recipe.memory.page_activations:
        yield {"train.recompute": True, "memory.page_activations": True}
    if not recipe.memory.page_weights and not recipe.restarts.every:
        yield {**quantized, "train.recompute": True, "memory.page_weights": True}
    if adamw and recipe.optimizer.paged is not True:
        yield {"optimizer.paged": True}


def _tried(earlier: list[Checked], room: Room, runtime: int, changes: Changes) -> list[Fit]:
    """One fit, or none.

    earlier   the job as it is and, once one was tried, with a quantized base: their meta models are used again
    """
    try:
        recipe = with_changes(earlier[0].recipe, changes)
        same = next((c for c in earlier if c.recipe.storage == recipe.storage), None)
        other = preflight(earlier[0].job.with_recipe(recipe), earlier=same)
        earlier += [other] if same is None else []
        found = estimate(other, runtime)
    except VeneerError:  # a change that this recipe cannot take
        return []
    return [] if verdict(found, room) else [Fit(changes, found, other)]
