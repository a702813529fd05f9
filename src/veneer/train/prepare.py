"""From a recipe to a job that is ready to run: model, adapter, examples, and the order of all steps."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from veneer.adapters.attach import Adapter, attach
from veneer.adapters.base_storage import base_storage
from veneer.adapters.quantized import load_base
from veneer.adapters.targets import Targeting
from veneer.data.example import Example
from veneer.data.pack import plan_batches
from veneer.data.render import Renderer, RenderReport
from veneer.data.sources import read_rows
from veneer.errors import ConfigError
from veneer.methods.base import config_from
from veneer.models.load import compute_dtype
from veneer.train.settings import MethodSettings, Recipe, TrainSettings

Plan = list[list[list[int]]]
"""Steps of micro-batches of indices of examples."""

Progress = Callable[[str], None]


@dataclass
class Job:
    """All that a run needs."""

    model: Any
    tokenizer: Any
    adapter: Adapter
    examples: list[Example]
    report: RenderReport
    held_out: list[Example]
    plan: Plan
    data_hash: str


def prepare(recipe: Recipe, say: Progress = lambda _: None) -> Job:
    """Load, read, render, attach and plan; everything that can be wrong with a recipe is found here.

    say    is told what happens now
    """
    say(f"loading {recipe.model}")
    storage = base_storage(recipe.storage.model_dump())
    paged = recipe.memory.page_weights
    loaded = load_base(recipe.model, storage=storage, dtype=recipe.train.dtype, paged=paged, say=say)
    say(f"reading {recipe.data.train}")
    renderer = Renderer(loaded.tokenizer, recipe.data, recipe.train.max_length)
    rendered = renderer.render_all(read_rows(recipe.data.train, split=recipe.data.split, limit=recipe.data.rows))
    held_out: list[Example] = []
    if recipe.data.eval is not None:
        rows = read_rows(recipe.data.eval, split=recipe.data.split, limit=recipe.data.eval_rows)
        held_out = renderer.render_all(rows).examples
    adapter = adapter_for(loaded.model, recipe.method, seed=recipe.train.seed, base=recipe.model)
    plan = order_of_steps([len(e) for e in rendered.examples], recipe.train, packing=recipe.data.packing)
    examples = rendered.examples
    _check_lengths(loaded.model, [*examples, *held_out])
    return Job(loaded.model, loaded.tokenizer, adapter, examples, rendered.report, held_out, plan, hash_of(examples))


def adapter_for(model: Any, method: MethodSettings, *, seed: int, base: str) -> Adapter:
    """The recipe's adapter on `model`, attached, its dropout off."""
    targeting = Targeting(targets=method.targets, exclude=method.exclude, layers=method.layers)
    return attach(model, config_from(method.name, method.own), targeting, seed=seed, base=base).eval()


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
    dtype = str(compute_dtype(recipe.train.dtype)).removeprefix("torch.")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": dtype})})


def _check_lengths(model: Any, examples: Sequence[Example]) -> None:
    """Raises ConfigError if a row is longer than the model can read."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(examples, key=len)
    if most is not None and len(longest) > most:
        raise ConfigError(
            f"{longest.source}:{longest.line} has {len(longest)} tokens, but the model reads at most {most}; "
            f"set train.max_length to {most} or less"
        )


def hash_of(examples: Sequence[Example]) -> str:
    """sha256 over the length of every example, its tokens and whether each is trained."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.tokens.astype("int32").tobytes() + example.supervised.astype("uint8").tobytes())
    return digest.hexdigest()
