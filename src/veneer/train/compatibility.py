"""What a recipe asks of its model, held against the model without its weights: refused before any of them is read."""

from typing import Any

from veneer.adapters.attach import fitting_paths
from veneer.adapters.targets import Targeting
from veneer.adapters.trained_modules import chosen_modules
from veneer.adapters.virtual_tokens import shape_of
from veneer.base.base import Base
from veneer.base.device import CPU
from veneer.errors import ModelError
from veneer.methods.base import config_from
from veneer.models.skeleton import build_skeleton
from veneer.models.sources import resolve
from veneer.recipe.settings import NONE, MethodSettings, Recipe


def check_suited(recipe: Recipe) -> None:
    """Raise ModelError for a model that makes no next words or takes no prompt, and TargetError or ConfigError where
    the method does not fit its targets.
    """
    model = build_skeleton(resolve(recipe.model), CPU.dtype(recipe.train.dtype))
    _refuse_encoder(model, recipe)
    if recipe.prompt.name != NONE:
        shape_of(model)
    if recipe.method.name != NONE:
        method = recipe.method
        fitting_paths(model, config_from(method.name, method.own), targeting_of(method))
        chosen_modules(Base(model), method.trained_modules)


def targeting_of(method: MethodSettings) -> Targeting:
    """Where the recipe's method applies."""
    return Targeting(targets=method.targets, exclude=method.exclude, layers=method.layers)


def _refuse_encoder(model: Any, recipe: Recipe) -> None:
    """Raise ModelError for a model without a head for words, or whose attention sees the words that are to be learnt.

    transformers notes with each attention whether it is causal; where it notes nothing the model is taken for one.
    """
    text = type(model.config.get_text_config())  # what belongs to images has a config of its own
    attentions = [m for m in model.modules() if type(getattr(m, "config", None)) is text and hasattr(m, "is_causal")]
    ahead = bool(attentions) and not any(m.is_causal for m in attentions)
    if model.get_output_embeddings() is not None and not ahead:
        return
    why = "its attention sees later tokens" if ahead else "it has no output head"
    asked = {"method": recipe.method.name, "prompt": recipe.prompt.name}
    what = " and ".join(f"{kind} {name}" for kind, name in asked.items() if name != NONE)
    raise ModelError(
        f"{what} cannot be trained on {recipe.model}: {type(model).__name__} is an encoder ({why}), and training "
        "teaches the next token. Nothing was loaded; give a causal language model (model: ...)"
    )
