"""What is alive between the steps: while held-out rows are evaluated, and while the adapter is written.

Evaluation is traced as a step is (`step`), on the code that evaluates.  A checkpoint is written from views, one tensor
at a time; of an adapter all tensors are made first, and some methods make them anew: counted on those very tensors.
"""

from typing import Any

import torch

from veneer.base.base import Base
from veneer.data.pack import Batch
from veneer.methods.restartable import restartable
from veneer.plan.activation_trace import TRACED, Followed, Step, foreseeing, largest_batches, on_meta
from veneer.plan.meta_model import Plain
from veneer.tasks.base import held_out_batches
from veneer.tasks.causal_lm import CausalLM
from veneer.train.job import Job, held_out_settings
from veneer.train.restarts import restart_steps


def evaluations(plain: Plain, rows: Job, blocks: int) -> list[Step]:
    """The held-out micro-batches that may take most, in a model of so many blocks; none without held-out rows."""
    if not rows.held_out:
        return []
    order = [held_out_batches(rows.held_out, **held_out_settings(plain.recipe))]
    largest = largest_batches(plain.recipe, rows.held_out, order, rounded=False)
    with foreseeing(plain.recipe):
        return [_evaluated(plain, batch, blocks) for batch in largest]


def _evaluated(plain: Plain, batch: Batch, blocks: int) -> Step:
    seen = Followed(plain, TRACED)
    at_head: list[tuple[int, int]] = []

    def begun(*_: Any) -> None:
        if not at_head:
            at_head.append((seen.ledger.live, seen.ledger.mark()))

    seen.model.get_output_embeddings().register_forward_pre_hook(begun)
    seen.change.eval()
    with seen.ledger:
        CausalLM().summed_loss(Base(seen.model), on_meta(batch), packed=plain.recipe.data.packing)
    kept, forward = at_head[0]
    slope = seen.after[-1] - seen.after[-2]  # keys and values of a prefix
    return Step(kept + slope * (blocks - TRACED), forward - kept, seen.ledger.peak - kept, 0)


def copied_bytes(plain: Plain, steps: int, trained: int) -> int:
    """Of the tensors of an adapter's folder that are made to be written, after all restarts of a run of so many steps.

    trained    numbers on the whole model
    """
    with foreseeing(plain.recipe):
        seen = Followed(plain, 1)
        deltas = seen.change.deltas.values()
        with seen.ledger:
            for _ in restart_steps(plain.recipe.restarts, steps):
                for delta in restartable(seen.change.deltas).values():
                    delta.remember_()
                    delta.restart_(torch.Generator())
            before = seen.ledger.live
            written = [delta.tensors() for delta in deltas]  # a prompt's table is written as it is
            copied = seen.ledger.live - before
        del written
    return round(copied * trained / seen.change.n_params())
