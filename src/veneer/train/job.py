"""The rows and steps of a run: everything a recipe asks for that needs no weights."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from veneer.base.device import find_device
from veneer.base.vocabulary import add_tokens
from veneer.data.example import Example
from veneer.data.pack import plan_batches
from veneer.data.render import RenderReport
from veneer.data.sources import read_rows
from veneer.models.skeleton import load_tokenizer
from veneer.models.sources import resolve
from veneer.recipe.settings import Recipe, TrainSettings
from veneer.tasks import TASKS, Task

BatchPlan = list[list[list[int]]]
"""Steps of micro-batches of example numbers."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A recipe's examples and the order of its steps."""

    recipe: Recipe
    tokenizer: Any
    examples: list[Example]
    report: RenderReport
    """How the training rows were read."""
    held_out: list[Example]
    steps: BatchPlan
    data_hash: str
    """sha256 of the training examples."""

    @property
    def task(self) -> Task:
        """What is learned."""
        return TASKS[self.recipe.task]()

    def with_recipe(self, recipe: Recipe) -> "Job":
        """The same rows under another recipe, with its own steps."""
        return replace(self, recipe=recipe, steps=steps_of(recipe, self.examples))


def read_job(recipe: Recipe, say: Say = lambda _: None, tokenizer: Any = None) -> Job:
    """Read and tokenize the rows and lay out all steps.

    tokenizer    None for the model's
    Raises DataError for rows that cannot be used, ModelError for a model that is not found.
    """
    say(f"reading {recipe.data.train}")
    tokenizer = tokenizer or load_tokenizer(resolve(recipe.model))
    add_tokens(tokenizer, recipe.tokens.add)
    renderer = TASKS[recipe.task]().renderer(tokenizer, recipe.data, recipe.train.max_length)
    rendered = renderer.render_all(read_rows(recipe.data.train, split=recipe.data.split, limit=recipe.data.rows))
    held_out: list[Example] = []
    if recipe.data.eval is not None:
        rows = read_rows(recipe.data.eval, split=recipe.data.split, limit=recipe.data.eval_rows)
        held_out = renderer.render_all(rows).examples
    examples = rendered.examples
    return Job(recipe, tokenizer, examples, rendered.report, held_out, steps_of(recipe, examples), hash_of(examples))


def steps_of(recipe: Recipe, examples: Sequence[Example]) -> BatchPlan:
    """Every step of the recipe's run over these examples."""
    return order_of_steps([len(e) for e in examples], recipe.train, packing=recipe.data.packing)


def order_of_steps(lengths: Sequence[int], train: TrainSettings, *, packing: bool) -> BatchPlan:
    """Every step of a run: whole epochs, each in its own order, cut at `steps` or at the share of an epoch."""
    plan: BatchPlan = []
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


def held_out_settings(recipe: Recipe) -> dict[str, Any]:
    """How held-out examples are put into batches: arguments of `Task.held_out_loss` and `held_out_batches`."""
    train = recipe.train
    return {
        "packed": recipe.data.packing,
        "max_length": train.max_length,
        "micro_batch_tokens": train.micro_batch_tokens,
    }


def with_dtype(recipe: Recipe) -> Recipe:
    """The recipe with its compute dtype chosen, so that a resumed run keeps the one it began with."""
    dtype = str(find_device(recipe.device).dtype(recipe.train.dtype)).removeprefix("torch.")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": dtype})})


def hash_of(examples: Sequence[Example]) -> str:
    """sha256 over each example's length, tokens and supervised positions."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.tokens.astype("int32").tobytes() + example.supervised.astype("uint8").tobytes())
    return digest.hexdigest()
