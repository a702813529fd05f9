"""Seconds of a recipe's micro-batches, from the few that are timed: pieces of one block, put together for all."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from veneer.base.base import Base
from veneer.data.pack import Batch
from veneer.disk.readahead import BUFFERS
from veneer.kernels import native
from veneer.models.blocks import blocks_of
from veneer.plan.block_timing import RUNS, Pieces, pieces
from veneer.plan.io_time import Needs
from veneer.plan.meta_model import Plain
from veneer.plan.timing_cache import kept
from veneer.plan.workload import Load, batch_of, line_through, load_of, representatives
from veneer.recipe.settings import Recipe
from veneer.tasks.causal_lm import ROUND
from veneer.train.activation_checkpointing import chosen_blocks
from veneer.train.job import BatchPlan, Job

Ran = Callable[[int], None]


class Clock:
    """Times of one recipe's micro-batches."""

    def __init__(self, recipe: Recipe, rows: Job, order: BatchPlan, ran: Ran) -> None:
        self.recipe, self.rows, self.order, self._ran = recipe, rows, order, ran
        self.plain = Plain.of(recipe)
        self.model = self.plain.model()
        self.blocks = len(blocks_of(self.model))
        again = len(chosen_blocks(Base(self.model), recipe.train.recompute))
        self.counts = {kind: n for kind, n in ((False, self.blocks - again), (True, again)) if n}
        self.multiple = ROUND if recipe.data.packing else 1
        loads = {tuple(m): self.load(m, rows.examples) for step in order for m in step}
        self.loads = [[loads[tuple(m)] for m in step] for step in order]
        self.chosen = representatives(list(loads.values()))
        self.measured = [{kind: self._pieces(load, kind) for kind in self.counts} for load in self.chosen]

    def load(self, members: Any, examples: Any) -> Load:
        """The load of these examples together."""
        return load_of(members, examples, self.multiple, self.model.config.get_text_config().hidden_size)

    def _pieces(self, load: Load, again: bool) -> Pieces:
        batch = batch_of(load, self.rows.examples, self.multiple)

        def measure() -> dict[str, float]:
            return asdict(pieces(self.plain, batch, again, self._ran))

        return Pieces(**kept({"batch": _lengths(batch), "recomputed": again, **facts(self.plain)}, measure))

    def _sum(self, seconds: Callable[[dict[bool, Pieces]], float]) -> Callable[[float], float]:
        """A line through what was measured: work -> seconds."""
        points = [(load.work, seconds(found)) for load, found in zip(self.chosen, self.measured, strict=True)]
        return line_through(points)

    def body(self, needs: Needs) -> Callable[[float], float]:
        """Work -> seconds of all blocks, forward and backward, each at least as long as the disk needs for it."""
        waits = max(1 - BUFFERS / self.blocks, 0.0)  # those in the buffers when the direction turns are there

        def seconds(found: dict[bool, Pieces]) -> float:
            inside = 0.0
            for kind, n in self.counts.items():
                for taken, least in ((found[kind].forward, needs.forward), (found[kind].backward, needs.backward)):
                    inside += n * (waits * max(taken, least) + (1 - waits) * taken)
            return min(p.outside for p in found.values()) + inside

        return self._sum(seconds)

    def forward(self, needs: Needs) -> Callable[[float], float]:
        """Work -> seconds without a gradient."""
        return self._sum(
            lambda found: min(p.outside + self.blocks * max(p.forward, needs.weights) for p in found.values())
        )

    def mean(self, name: str) -> float:
        """A piece that does not depend on the work."""
        values = [getattr(p, name) for found in self.measured for p in found.values()]
        return float(sum(values) / len(values))


def most_runs(recipe: Recipe) -> int:
    """How often a micro-batch may be timed."""
    return 2 * (1 + RUNS) * (1 if isinstance(recipe.train.recompute, bool) else 2)


def facts(plain: Plain) -> dict[str, Any]:
    """What the seconds of a block depend on, besides the batch and the machine."""
    recipe, storage = plain.recipe, plain.storage
    return {
        "config": (plain.folder / "config.json").read_text(encoding="utf-8"),
        "dtype": recipe.train.dtype,
        "storage": None if storage is None else [storage.settings, storage.backend],
        "kernels": None if storage is None and recipe.optimizer.bits == 32 else native.status().isa,
        "method": recipe.method.model_dump(mode="json"),
        "prompt": recipe.prompt.model_dump(mode="json"),
        "optimizer": [recipe.optimizer.name, recipe.optimizer.bits, recipe.optimizer.in_backward],
        "packing": recipe.data.packing,
    }


def _lengths(batch: Batch) -> list[list[int]]:
    return [batch.starts.tolist(), [len(batch.targets)]]
