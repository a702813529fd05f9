"""veneer: adapt pretrained models on the machine you have.

Importing this package changes nothing in the process; each public name is loaded when it is first used. None of them is
the name of a room (`veneer.train`, `veneer.generate`, ...), because a room that was imported would take its place.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "veneer.adapters.adapter",
    "EvalSettings": "veneer.evaluate.runner",
    "LoRAConfig": "veneer.methods.lora",
    "METHODS": "veneer.methods",
    "Recipe": "veneer.recipe.settings",
    "Renderer": "veneer.data.render",
    "Targeting": "veneer.adapters.targets",
    "VeneerError": "veneer.errors",
    "as_lora": "veneer.merge.export",
    "attach": "veneer.adapters.attach",
    "encode_chat": "veneer.generate.streaming:encode",
    "evaluate_rows": "veneer.evaluate.runner:evaluate",
    "generate_tokens": "veneer.generate.engine:generate",
    "load_adapter": "veneer.adapters.attach",
    "load_model": "veneer.base.load",
    "load_recipe": "veneer.recipe.load",
    "merge_adapter": "veneer.merge.fold:merge",
    "merge_and_verify": "veneer.merge.verified_merge",
    "method_config": "veneer.methods.base:config_from",
    "read_rows": "veneer.data.sources",
    "recipe_from": "veneer.recipe.load",
    "stop_ids": "veneer.generate.stop",
    "train_adapter": "veneer.train.loop:train",
}
"""Name -> its module, and its name there after a colon where that is another one."""

__all__ = ["__version__", *sorted(_HOMES)]

# ruff: noqa: F401
if TYPE_CHECKING:  # the same again for editors and type checkers; a test compares the two
    from veneer.adapters.adapter import Adapter as Adapter
    from veneer.adapters.attach import attach as attach
    from veneer.adapters.attach import load_adapter as load_adapter
    from veneer.adapters.targets import Targeting as Targeting
    from veneer.base.load import load_model as load_model
    from veneer.data.render import Renderer as Renderer
    from veneer.data.sources import read_rows as read_rows
    from veneer.errors import VeneerError as VeneerError
    from veneer.evaluate.runner import EvalSettings as EvalSettings
    from veneer.evaluate.runner import evaluate as evaluate_rows
    from veneer.generate.engine import generate as generate_tokens
    from veneer.generate.stop import stop_ids as stop_ids
    from veneer.generate.streaming import encode as encode_chat
    from veneer.merge.export import as_lora as as_lora
    from veneer.merge.fold import merge as merge_adapter
    from veneer.merge.verified_merge import merge_and_verify as merge_and_verify
    from veneer.methods import METHODS as METHODS
    from veneer.methods.base import config_from as method_config
    from veneer.methods.lora import LoRAConfig as LoRAConfig
    from veneer.recipe.load import load_recipe as load_recipe
    from veneer.recipe.load import recipe_from as recipe_from
    from veneer.recipe.settings import Recipe as Recipe
    from veneer.train.loop import train as train_adapter


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}; it has {', '.join(__all__)}")
    home, _, there = _HOMES[name].partition(":")
    return getattr(import_module(home), there or name)


def __dir__() -> list[str]:
    return __all__
