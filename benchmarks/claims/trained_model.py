"""One model with its examples, trained on again and again: loaded, read and computed as far as it stays the same once.

Each training is a recipe's, made of the parts of `veneer train`, and leaves the model as it was.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.claims.frozen_prefix import shorten_
from veneer.recipe.load import recipe_from
from veneer.recipe.settings import Recipe
from veneer.train.checkpoint import TrainState
from veneer.train.job import held_out_settings, read_job
from veneer.train.optim import build_optimizer
from veneer.train.preflight import preflight
from veneer.train.restarts import Restarts
from veneer.train.setup import Training, attach_parts, set_up
from veneer.train.step import optimizer_step

Tree = Mapping[str, Any]
"""A recipe's sections and keys."""
Measure = Callable[[Training], dict[str, float]]
"""Figures of the model between two steps, its deltas' dropout off."""


@dataclass
class Trained:
    """The figures of one training."""

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
        self._training = set_up(preflight(read_job(self._recipe({}))))
        self._training.adapter.detach()
        if first:
            self._training = shorten_(self._training, first)

    def trained(self, changes: Tree, measure: Measure, every: int, also: Collection[int] = ()) -> Trained:
        """One training, measured every so many steps.

        changes    of the sections method, optimizer, train and restarts
        also       more numbers of steps after which it is measured
        Raises TrainingError for a loss or gradient that is not finite, as `veneer train` does.
        """
        recipe = self._recipe(changes)
        torch.manual_seed(recipe.train.seed)
        base, job = self._training.base, self._training.job.with_recipe(recipe)
        adapter = attach_parts(base, job)
        steps = len(job.steps)
        try:
            return _steps(Training(job, base, adapter), measure, {*range(0, steps, every), *also, steps})
        finally:
            adapter.detach()

    def loss(self, training: Training) -> float:
        """The mean over the held-out rows, in nats a supervised position, with the training's adapter."""
        job = training.job
        settings = held_out_settings(self._recipe({}))
        return job.task.held_out_loss(training.base, job.held_out, **settings).mean

    def _recipe(self, changes: Tree) -> Recipe:
        unknown = changes.keys() - {"method", "optimizer", "train", "restarts"}
        if unknown:
            raise KeyError(f"a training may not change {', '.join(sorted(unknown))}")
        sections = {name: {**self._tree.get(name, {}), **section} for name, section in changes.items()}
        return recipe_from({**self._tree, **sections})


def _steps(training: Training, measure: Measure, looks: Collection[int]) -> Trained:
    job, adapter, recipe = training.job, training.adapter, training.job.recipe
    state = TrainState(training.base, adapter, build_optimizer(adapter.named(), recipe.optimizer))
    done = Trained(adapter.n_params(), curve=[{"step": 0, **measure(training)}])
    restarts = Restarts(recipe, adapter, len(job.steps))
    with restarts.folded():
        while state.step < len(job.steps):
            if restarts.due(state.step):
                restarts.restart_(state.optimizer, state.step)
            adapter.train()
            done.losses.append(optimizer_step(training, state)["loss"])
            adapter.eval()
            if state.step in looks:
                done.curve.append({"step": state.step, **measure(training)})
    done.seconds = state.seconds
    done.optimizer_bytes = sum(
        t.numel() * t.element_size() for s in state.optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    )
    return done
