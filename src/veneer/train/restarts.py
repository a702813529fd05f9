"""ReLoRA and ReMoRA: fold the change into the frozen weights every few steps and begin a new one.

    for each cycle: train the delta; W <- W + its change; the delta begins anew; its optimizer state is pruned; the
    learning rate rises again (`schedule.multiplier`)

Sources: ReLoRA, arXiv:2307.05695, algorithm 1; ReMoRA, arXiv:2405.12130, section 4.4 (mora, variant sharing: each cycle
groups inputs and outputs in another way).
Departs from them: the base's weights stay what they are.  Finished cycles are kept as factors, and the weights that
training sees are made from the base and all factors at each restart; so rounding does not add up, a checkpoint is
small, and the result is one adapter of the unchanged base.  The papers' warm start, plain training of all weights
first, is a run of its own: method full, then `veneer merge`, then a run with restarts on the merged model.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from veneer.adapters.adapter import Adapter
from veneer.adapters.restart_merge import Folding
from veneer.errors import ConfigError
from veneer.methods.restartable import refuse_restarts, restartable
from veneer.recipe.settings import Recipe, RestartSettings
from veneer.train.optim.state_reset import reset_
from veneer.train.schedule import warmup_steps

KEEP = 0.1
"""Share of the moments that a partial reset leaves, where a recipe says nothing."""


def restart_steps(settings: RestartSettings, steps: int) -> list[int]:
    """The numbers of steps done at which restarts come, in a run of `steps`."""
    return list(range(settings.first or settings.every, steps, settings.every)) if settings.every else []


def check_restarts(recipe: Recipe, adapter: Adapter, steps: int) -> None:
    """Raise ConfigError, before the first step, where the recipe's restarts fit neither its method nor its length."""
    settings = recipe.restarts
    if not settings.every:
        return
    if adapter.settings is not None:
        refuse_restarts(adapter.settings)
    first, warmup = settings.first or settings.every, warmup_steps(recipe.train.warmup, steps)
    if first >= steps:
        raise ConfigError(
            f"the first restart would come after step {first}, but the run has {steps}; lower restarts.every"
        )
    if first < warmup:
        raise ConfigError(
            f"the first restart, after step {first}, would come within the {warmup} steps of train.warmup; raise "
            "restarts.first, or lower train.warmup"
        )
    Folding(adapter, settings.fold)


class Restarts:
    """The restarts of one run."""

    def __init__(self, recipe: Recipe, adapter: Adapter, steps: int) -> None:
        self._settings, self._seed, self._adapter = recipe.restarts, recipe.train.seed, adapter
        self._steps = restart_steps(recipe.restarts, steps)
        self._folding = Folding(adapter, recipe.restarts.fold) if self._steps else None

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, the model's weights hold the finished cycles; after it the base's own, bit for bit."""
        if self._folding is None:
            yield
            return
        self._folding.put_()
        try:
            yield
        finally:
            self._folding.restore_()

    def due(self, step: int) -> bool:
        """Whether a restart comes once `step` steps are done."""
        return step in self._steps

    def restart_(self, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
        """End a cycle and begin the next; returns the restart's figures."""
        assert self._folding is not None
        began = time.perf_counter()
        cycle = self._steps.index(step) + 2
        rng = torch.Generator().manual_seed((self._seed + cycle * 0x9E3779B97F4A7C15) % 2**63)
        deltas = restartable(self._adapter.deltas).values()  # other parts are not restarted
        trained = [parameter for delta in deltas for parameter in delta.parameters()]
        for delta in deltas:
            delta.remember_()
        rounding = self._folding.put_()
        for delta in deltas:
            delta.restart_(rng)
        keep = KEEP if self._settings.keep is None else self._settings.keep
        pruned = reset_(optimizer, trained, self._settings.reset, keep, rng)
        return {
            "cycle": cycle,
            "folded": len(self._folding.paths),
            "rounding": rounding.of_weight,
            "rounding_of_change": rounding.of_change,
            "pruned": pruned,
            "seconds": time.perf_counter() - began,
        }
