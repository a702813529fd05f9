"""From a recipe to a job that is ready to run: model, adapter, examples, and the order of all steps."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.base.base import Base
from veneer.base.device import find_device
from veneer.base.load import load_model
from veneer.base.storage_config import base_storage, computed_by_kernels, storage_of
from veneer.base.vocabulary import add_tokens
from veneer.data.example import Example
from veneer.data.pack import plan_batches
from veneer.data.render import Renderer, RenderReport
from veneer.data.sources import read_rows
from veneer.errors import ConfigError
from veneer.kernels import native
from veneer.methods.base import MethodConfig, config_from
from veneer.models.skeleton import load_tokenizer
from veneer.models.sources import resolve
from veneer.prompts.base import config_from as prompt_config
from veneer.recipe.settings import NONE, Recipe, TrainSettings
from veneer.train.compatibility import check_suited, targeting_of
from veneer.train.init_pass import looking
from veneer.train.optim.step_in_backward import check_in_backward
from veneer.train.restarts import check_restarts

EIGHT_BITS = "8-bit AdamW"
Plan = list[list[list[int]]]
"""Steps of micro-batches of indices of examples."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Begun:
    """How an adapter that looked at data began: a run that goes on does not look again."""

    config: MethodConfig
    paths: list[str]


@dataclass
class Job:
    """All that a run needs."""

    recipe: Recipe
    """The one in force."""
    model: Any
    tokenizer: Any
    adapter: Adapter
    examples: list[Example]
    report: RenderReport
    held_out: list[Example]
    plan: Plan
    data_hash: str


@dataclass
class Rows:
    """A recipe's rows as tokens."""

    tokenizer: Any
    examples: list[Example]
    report: RenderReport
    held_out: list[Example]


Check = Callable[[Recipe, Rows, Plan, bool], Recipe]
"""Looks at a job before its weights are read: returns the recipe, changed where `memory.auto` lets it pick, or raises
Refused.  The last argument says whether a run has begun with this recipe, which then stays as it is."""


def unchecked(recipe: Recipe, rows: Rows, plan: Plan, begun: bool) -> Recipe:
    """No look at all.  Raises ConfigError where something would have to be picked."""
    if recipe.memory.auto and not begun:
        raise ConfigError(
            "memory.auto is true, but there is nothing here that picks: give train a check "
            "(veneer.plan.gate.refusing), or use the command `veneer train`"
        )
    return recipe


def prepare(
    recipe: Recipe,
    say: Progress = lambda _: None,
    begun: Begun | None = None,
    check: Check = unchecked,
    fixed: bool = False,
) -> Job:
    """Read, render, plan, load and attach; everything that can be wrong with a recipe is found here.

    say      is told what happens now
    begun    of the run that goes on, where its method looked at data
    check    looks at the rows before the model is loaded, and may change the recipe
    fixed    whether a run has begun with it
    """
    check_suited(recipe)
    rows = read_examples(recipe, say)
    plan = steps_of(recipe, rows.examples)
    checked = check(recipe, rows, plan, fixed)
    if checked is not recipe:  # something was picked
        recipe = checked
        plan = steps_of(recipe, rows.examples)
    say(f"loading {recipe.model}")
    storage = base_storage(recipe.storage.model_dump())
    paged = recipe.memory.page_weights
    loaded = load_model(recipe.model, storage=storage, dtype=recipe.train.dtype, paged=paged, say=say)
    if recipe.optimizer.bits == 8 and not computed_by_kernels(storage or storage_of(loaded.network)):
        native.say_without(EIGHT_BITS, say)  # with 4-bit weights it is said
    check_lengths(loaded.network, recipe, rows)
    adapter = adapter_for(loaded, recipe, rows.examples, plan, begun)
    check_restarts(recipe, adapter, len(plan))
    check_in_backward(recipe, adapter, plan)
    data_hash = hash_of(rows.examples)
    return Job(
        recipe, loaded.network, rows.tokenizer, adapter, rows.examples, rows.report, rows.held_out, plan, data_hash
    )


def read_examples(recipe: Recipe, say: Progress = lambda _: None) -> Rows:
    """The recipe's rows as tokens; no weights are read."""
    say(f"reading {recipe.data.train}")
    tokenizer = load_tokenizer(resolve(recipe.model))
    add_tokens(tokenizer, recipe.tokens.add)
    renderer = Renderer(tokenizer, recipe.data, recipe.train.max_length)
    rendered = renderer.render_all(read_rows(recipe.data.train, split=recipe.data.split, limit=recipe.data.rows))
    held_out: list[Example] = []
    if recipe.data.eval is not None:
        rows = read_rows(recipe.data.eval, split=recipe.data.split, limit=recipe.data.eval_rows)
        held_out = renderer.render_all(rows).examples
    return Rows(tokenizer, rendered.examples, rendered.report, held_out)


def adapter_for(base: Base, recipe: Recipe, examples: Sequence[Example], plan: Plan, begun: Begun | None) -> Adapter:
    """The recipe's adapter on `base`, attached, its dropout off; where it starts from data it has seen the first."""
    method, prompt = recipe.method, recipe.prompt
    config, look = None, None
    if method.name != NONE:
        config = config_from(method.name, method.own) if begun is None else begun.config
        tokens = 0 if config.data_init is None else config.data_init.look
        look = looking(base.network, examples, plan, tokens, packed=recipe.data.packing)
    return attach(
        base,
        config,
        targeting_of(method),
        prompt=None if prompt.name == NONE else prompt_config(prompt.name, prompt.own),
        trained_modules=method.trained_modules,
        new_tokens=recipe.tokens.add,
        trained_tokens=recipe.tokens.train,
        seed=recipe.train.seed,
        look=look,
        begun=None if begun is None else begun.paths,
    ).eval()


def steps_of(recipe: Recipe, examples: Sequence[Example]) -> Plan:
    """Every step of the recipe's run over these examples."""
    return order_of_steps([len(e) for e in examples], recipe.train, packing=recipe.data.packing)


def order_of_steps(lengths: Sequence[int], train: TrainSettings, *, packing: bool) -> Plan:
    """Every step of the run: whole epochs, each in an order of its own, cut at `steps` or at the share of an epoch."""
    plan: Plan = []
    epochs = train.epochs or 1.0
    epoch = 0
    while len(plan) < train.steps if train.steps else epoch < ceil(epochs):
        steps = plan_batches(
            lengths,
            max_length=train.max_length,
            tokens_per_step=train.tokens_per_step,
            micro_batch_tokens=train.micro_batch_tokens,
            seed=train.seed,
            epoch=epoch,
            packing=packing,
        )
        share = min(1.0, epochs - epoch) if train.steps is None else 1.0
        plan += steps[: max(1, round(share * len(steps)))]
        epoch += 1
    return plan[: train.steps]


def with_dtype(recipe: Recipe) -> Recipe:
    """The recipe with the compute dtype chosen, so that a run goes on in the one that it began in."""
    dtype = str(find_device("auto").dtype(recipe.train.dtype)).removeprefix("torch.")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": dtype})})


def check_lengths(model: Any, recipe: Recipe, rows: Rows) -> None:
    """Raises ConfigError if a row, with the prompt's virtual tokens before it, is longer than the model can read."""
    front = 0 if recipe.prompt.name == NONE else prompt_config(recipe.prompt.name, recipe.prompt.own).tokens
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max([*rows.examples, *rows.held_out], key=len)
    if most is not None and len(longest) + front > most:
        prompt = f" and {front} of the prompt in front" if front else ""
        raise ConfigError(
            f"{longest.source}:{longest.line} has {len(longest)} tokens{prompt}, but the model reads at most {most}; "
            f"set train.max_length to {most - front} or less"
        )


def hash_of(examples: Sequence[Example]) -> str:
    """sha256 over the length of every example, its tokens and whether each is trained."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.tokens.astype("int32").tobytes() + example.supervised.astype("uint8").tobytes())
    return digest.hexdigest()
