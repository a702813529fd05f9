"""One model with its examples, trained on again and again: loaded, read and computed as far as it stays the same once.

Each training is a recipe's, made of the parts of `veneer train`, and leaves the model as it was.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.claims.frozen_prefix import shorten_
from veneer.recipe.load import recipe_from
from veneer.recipe.settings import Recipe
from veneer.train.checkpoint import TrainState
from veneer.train.eval_loss import mean_loss
from veneer.train.optim import build_optimizer
from veneer.train.restarts import Restarts
from veneer.train.setup import Job, change_for, prepare, steps_of
from veneer.train.step import optimizer_step

Tree = Mapping[str, Any]
"""A recipe's sections and keys."""
Measure = Callable[[Job], dict[str, float]]
"""Figures of the model between two steps, its deltas' dropout off."""


@dataclass
class Training:
    """What one training came to."""

    parameters: int
    """Trained numbers."""
    optimizer_bytes: int = 0
    """State that the optimizer keeps for them."""
    seconds: float = 0.0
    """In steps, without measuring."""
    losses: list[float] = field(default_factory=list)
    """Of every step, in nats a supervised token."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """`step` and the measured figures: before the first step, where it was asked for, and after the last."""

    @property
    def last(self) -> dict[str, float]:
        """The figures after the last step, without its number."""
        return {k: v for k, v in self.curve[-1].items() if k != "step"}


class Subject:
    """A model and rows for many trainings.

    tree     model and data of every training, dtype and max_length of `train`, and what they have in common
    first    the lowest block that is trained; those below are computed once (`shortcut`); 0 trains the model as it is
    """

    def __init__(self, tree: Tree, first: int = 0) -> None:
        self._tree = {"run": "nowhere", **tree}
        self._job = prepare(self._recipe({}))
        self._job.adapter.detach()
        if first:
            shorten_(self._job, first)

    def trained(self, changes: Tree, measure: Measure, every: int, also: Collection[int] = ()) -> Training:
        """One training, measured every so many steps.

        changes    of the sections method, optimizer, train and restarts
        also       more numbers of steps after which it is measured
        Raises TrainingError for a loss or gradient that is not finite, as `veneer train` does.
        """
        recipe = self._recipe(changes)
        torch.manual_seed(recipe.train.seed)
        plan = steps_of(recipe, self._job.examples)
        adapter = change_for(self._job.model, recipe, self._job.examples, plan, None)
        job = replace(self._job, adapter=adapter, plan=plan)
        try:
            return _steps(recipe, job, measure, {*range(0, len(plan), every), *also, len(plan)})
        finally:
            adapter.detach()

    def loss(self, job: Job) -> float:
        """The mean over the held-out rows, in nats a supervised token, as the job's model stands."""
        return mean_loss(job.model, job.held_out, self._recipe({}))

    def _recipe(self, changes: Tree) -> Recipe:
        unknown = changes.keys() - {"method", "optimizer", "train", "restarts"}
        if unknown:
            raise KeyError(f"a training may not change {', '.join(sorted(unknown))}")
        sections = {name: {**self._tree.get(name, {}), **section} for name, section in changes.items()}
        return recipe_from({**self._tree, **sections})


def _steps(recipe: Recipe, job: Job, measure: Measure, looks: Collection[int]) -> Training:
    state = TrainState(job.adapter, build_optimizer(job.adapter.named(), recipe.optimizer))
    done = Training(job.adapter.n_params(), curve=[{"step": 0, **measure(job)}])
    restarts = Restarts(recipe, job.adapter, len(job.plan))
    with restarts.folded():
        while state.step < len(job.plan):
            if restarts.due(state.step):
                restarts.restart_(state.optimizer, state.step)
            job.adapter.train()
            done.losses.append(optimizer_step(recipe, job, state)["loss"])
            job.adapter.eval()
            if state.step in looks:
                done.curve.append({"step": state.step, **measure(job)})
    done.seconds = state.seconds
    done.optimizer_bytes = sum(
        t.numel() * t.element_size() for s in state.optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    )
    return done
