"""What `train` would refuse only once the weights are there, found without them.

The checks are those of training, on the model and the change on torch's meta device.
"""

from dataclasses import replace
from pathlib import Path

from veneer.base.base import Base
from veneer.base.device import CPU
from veneer.base.load import refuse_paging
from veneer.disk.scratch import refuse_memory
from veneer.plan.activation_trace import foreseeing
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import Recipe
from veneer.train.activation_checkpointing import chosen_blocks
from veneer.train.job import BatchPlan, Job
from veneer.train.optim.adamw import refuse_idle_bits
from veneer.train.optim.param_groups import parameter_groups
from veneer.train.optim.step_in_backward import check_in_backward
from veneer.train.restarts import check_restarts
from veneer.train.setup import check_lengths


def check_sound(recipe: Recipe, rows: Job, order: BatchPlan) -> None:
    """Raise what training on these rows in this order of steps would raise before its first step.

    Not looked for is what `check_suited` finds, which needs no rows.  Raises ModelError for a model that cannot be
    followed without weights.
    """
    with foreseeing(recipe):
        plain = Plain.of(recipe)
        _check_places(plain)
        model = plain.model()
        base = Base(model)
        check_lengths(replace(rows, recipe=recipe), base)
        chosen_blocks(base, recipe.train.recompute)
        change = plain.change(model)
        check_restarts(recipe, change, len(order))
        check_in_backward(recipe, change, order)
        refuse_idle_bits(parameter_groups(change.named(), recipe.optimizer), recipe.optimizer)


def _check_places(plain: Plain) -> None:
    """Where things are paged to and from."""
    recipe, run = plain.recipe, Path(plain.recipe.run)
    if recipe.memory.page_weights:
        refuse_paging(recipe.model, plain.folder, plain.storage, CPU)
    if recipe.memory.page_activations:
        refuse_memory(run, "memory.page_activations", "put the run on a disk")
    if recipe.optimizer.paged is True:
        refuse_memory(run, "optimizer.paged", "put the run on a disk")
