"""What a recipe asks of its model, held against the model without its weights: refused before any of them is read."""

from veneer.adapters.attach import fitting_paths
from veneer.adapters.targets import Targeting
from veneer.adapters.virtual_tokens import shape_of
from veneer.base.base import Base
from veneer.base.device import CPU
from veneer.methods.base import config_from
from veneer.models.skeleton import build_skeleton
from veneer.models.sources import resolve
from veneer.recipe.settings import NONE, MethodSettings, Recipe
from veneer.tasks import TASKS


def check_suited(recipe: Recipe) -> None:
    """Raise ModelError for a model that makes no next words or takes no prompt, and TargetError or ConfigError where
    the method does not fit its targets.
    """
    model = build_skeleton(resolve(recipe.model), CPU.dtype(recipe.train.dtype))
    asked = {"method": recipe.method.name, "prompt": recipe.prompt.name}
    what = " and ".join(f"{kind} {name}" for kind, name in asked.items() if name != NONE)
    TASKS[recipe.task]().refuse_base(Base(model, name=recipe.model), what)
    if recipe.prompt.name != NONE:
        shape_of(model)
    if recipe.method.name != NONE:
        method = recipe.method
        fitting_paths(model, config_from(method.name, method.own), targeting_of(method))


def targeting_of(method: MethodSettings) -> Targeting:
    """Where the recipe's method applies."""
    return Targeting(targets=method.targets, exclude=method.exclude, layers=method.layers)
