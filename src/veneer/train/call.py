"""`veneer.train(...)`: train from a recipe, or train an adapter that is attached to a base in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from veneer.adapters.adapter import Adapter
from veneer.adapters.deltas import DeltaPart
from veneer.adapters.trained_modules import TrainedModules
from veneer.adapters.trained_tokens import TrainedTokens
from veneer.adapters.virtual_tokens import VirtualTokens
from veneer.base.base import Base
from veneer.base.vocabulary import add_tokens
from veneer.errors import ConfigError
from veneer.recipe.aliases import own_name
from veneer.recipe.load import load_recipe, recipe_from
from veneer.recipe.overrides import flat
from veneer.recipe.settings import NONE, Recipe
from veneer.train.activation_checkpointing import chosen_blocks
from veneer.train.events import Listener
from veneer.train.job import Say, read_job
from veneer.train.preflight import check_adapter, check_lengths
from veneer.train.run import Run, open_run, train_recipe
from veneer.train.setup import Training

RUNS = Path("runs")
"""Where runs without a folder of their own are written."""
FIXED = {"model", "device", "storage", "method", "tokens", "prompt"}
"""Sections that a base and its adapter settle."""


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path | Base,
    adapter: Adapter | None,
    settings: Mapping[str, Any],
    listeners: Sequence[Listener] = (),
    say: Say = lambda _: None,
) -> Run:
    """Train from `recipe` with `settings` over it, or train `adapter` in place; see `veneer.train`."""
    given = dict(flat(settings))
    if isinstance(recipe, Base):
        if adapter is None:
            raise ConfigError("train was given a base without an adapter; give train(base, attach(base, config), ...)")
        return train_attached(recipe, adapter, given, listeners, say)
    if adapter is not None:
        raise ConfigError("train was given a recipe and an adapter; give train(base, adapter, ...) or a recipe alone")
    if isinstance(recipe, str | Path):
        return train_recipe(load_recipe(recipe, given, prefix=""), listeners, say)[0]
    tree = recipe.tree() if isinstance(recipe, Recipe) else recipe
    return train_recipe(recipe_from(tree, given), listeners, say)[0]


def train_attached(
    base: Base, adapter: Adapter, settings: Mapping[str, Any], listeners: Sequence[Listener], say: Say
) -> Run:
    """Train an adapter in place on its base; nothing is loaded.

    settings    dotted keys of a recipe, by any of their names; without `run` a new folder under runs/ is made
    Raises ConfigError for keys that the base and the adapter fix already, and what training raises.
    """
    if adapter.base.network is not base.network:
        raise ConfigError("this adapter is on another base; give the base that it was attached to")
    if not adapter.attached:
        raise ConfigError("this adapter is detached; call adapter.attach() before training it")
    recipe = recipe_of(base, adapter, settings)
    with open_run(recipe, say) as session:
        if session.finished is not None:
            return session.finished
        job = read_job(session.recipe, say, base.tokenizer)
        check_lengths(job, base)
        chosen_blocks(base, job.recipe.train.recompute)
        check_adapter(job, adapter)
        return session.train(Training(job, base, adapter.eval()), listeners, say)


def recipe_of(base: Base, adapter: Adapter, settings: Mapping[str, Any]) -> Recipe:
    """The recipe that describes this base and this adapter, with `settings` for everything else."""
    tree: dict[str, Any] = {"model": base.name or base.kind, "method": {"name": NONE}, "prompt": {"name": NONE}}
    tree["train"] = {"dtype": str(base.dtype).removeprefix("torch.")}
    tree["storage"] = "dense" if base.storage is None else base.storage.settings
    tree["device"] = "auto" if base.device.is_cpu else str(base.device)
    for part in adapter.parts:
        if isinstance(part, DeltaPart):
            where = {k: v for k, v in asdict(part.targeting).items() if v and k != "blocks"}
            tree["method"] = {**asdict(part.config), **where, "name": part.config.method}
        elif isinstance(part, TrainedModules):
            tree["method"]["trained_modules"] = list(part.names)
        elif isinstance(part, TrainedTokens):
            new = add_tokens(base.tokenizer, adapter.new_tokens) if adapter.new_tokens else []
            tree["tokens"] = {"add": list(adapter.new_tokens), "train": part.ids(without=new)}
        elif isinstance(part, VirtualTokens):
            tree["prompt"] = {**asdict(part.config), "name": part.config.kind}
    fixed = sorted({own_name(key).partition(".")[0] for key in settings} & FIXED)
    if fixed:
        raise ConfigError(f"{', '.join(fixed)}: the base and the adapter say this already; leave it out")
    return recipe_from(tree, {"run": settings.get("run") or _new_run(), **settings})


def _new_run() -> str:
    """A new folder under runs/, made so that no other process takes it."""
    for number in count(1):
        folder = RUNS / f"run-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return str(folder)
    raise AssertionError("numbers do not end")
