"""What restarts hold besides the change that is trained: finished cycles, and the base's own weights.

Training keeps the factors of all finished cycles; where a weight takes them in, its own numbers wait beside it.
"""

from dataclasses import dataclass

from torch import nn

from veneer.adapters.layer_view import layer_at
from veneer.adapters.restart_merge import foldable_paths
from veneer.methods.base import METHODS
from veneer.methods.restartable import Restartable
from veneer.plan.meta_model import Plain
from veneer.train.restarts import restart_steps


@dataclass(frozen=True)
class Cycles:
    """Bytes at the end of a run."""

    past: int = 0
    """Finished cycles, float32; a checkpoint and the adapter hold them too."""
    base: int = 0
    """Copies of the weights that took them in."""


def cycles_of(plain: Plain, model: nn.Module, steps: int) -> Cycles:
    """What the restarts of a run of so many steps leave, for the model without weights."""
    recipe = plain.recipe
    finished = len(restart_steps(recipe.restarts, steps))
    if not finished:
        return Cycles()
    config, paths = plain.targets(model)
    kind = METHODS[config.method]
    assert issubclass(kind, Restartable), "a recipe with restarts of another method is refused"
    past = sum(kind.n_past(layer_at(model, path), config.at(path), finished) for path in paths)
    copied = [] if recipe.restarts.fold == "beside" else foldable_paths(model, paths)
    return Cycles(4 * past, sum(model.get_submodule(path).get_parameter("weight").nbytes for path in copied))
