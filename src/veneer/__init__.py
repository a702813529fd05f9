"""veneer: adapt pretrained models on the machine you have.

    import veneer as vn

    base = vn.load_model("smollm2-135m-instruct", storage="nf4")
    adapter = vn.attach(base, vn.LoRAConfig(rank=16, alpha=32))
    run = vn.train(base, adapter, data="train.jsonl", lr=1e-3)
    print(vn.evaluate(base, "test.jsonl").metrics, base.generate("Who is in Rome?"))

Importing this package changes nothing in the process; each public name is loaded when it is first used.  `train` and
`evaluate` are packages that can be called.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "veneer.api",
    "EvalSettings": "veneer.evaluate.runner",
    "LoRAConfig": "veneer.methods.lora",
    "METHODS": "veneer.methods",
    "Model": "veneer.api",
    "Recipe": "veneer.recipe.settings",
    "Renderer": "veneer.data.render",
    "Targeting": "veneer.adapters.targets",
    "VeneerError": "veneer.errors",
    "as_lora": "veneer.merge.export",
    "attach": "veneer.api",
    "encode_chat": "veneer.generate.streaming:encode",
    "generate_tokens": "veneer.generate.engine:generate",
    "load_adapter": "veneer.api",
    "load_model": "veneer.api",
    "load_recipe": "veneer.recipe.load",
    "method_config": "veneer.methods.base:config_from",
    "read_rows": "veneer.data.sources",
    "recipe_from": "veneer.recipe.load",
}
"""Name -> its module, and its name there after a colon if that is another one."""

_VERBS = ("evaluate", "train")
"""Packages that can be called."""

__all__ = ["__version__", *sorted([*_HOMES, *_VERBS])]

# ruff: noqa: F401
if TYPE_CHECKING:  # the same again for editors and type checkers; a test compares the two
    from veneer.adapters.targets import Targeting as Targeting
    from veneer.api import Adapter as Adapter
    from veneer.api import Model as Model
    from veneer.api import attach as attach
    from veneer.api import load_adapter as load_adapter
    from veneer.api import load_model as load_model
    from veneer.data.render import Renderer as Renderer
    from veneer.data.sources import read_rows as read_rows
    from veneer.errors import VeneerError as VeneerError
    from veneer.evaluate import Verb as _Evaluate
    from veneer.evaluate.runner import EvalSettings as EvalSettings
    from veneer.generate.engine import generate as generate_tokens
    from veneer.generate.streaming import encode as encode_chat
    from veneer.merge.export import as_lora as as_lora
    from veneer.methods import METHODS as METHODS
    from veneer.methods.base import config_from as method_config
    from veneer.methods.lora import LoRAConfig as LoRAConfig
    from veneer.recipe.load import load_recipe as load_recipe
    from veneer.recipe.load import recipe_from as recipe_from
    from veneer.recipe.settings import Recipe as Recipe
    from veneer.train import Verb as _Train

    evaluate: _Evaluate
    train: _Train


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return import_module(f"veneer.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}; it has {', '.join(__all__)}")
    home, _, there = _HOMES[name].partition(":")
    return getattr(import_module(home), there or name)


def __dir__() -> list[str]:
    return __all__
