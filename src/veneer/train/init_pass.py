"""The pass over the first training rows before training, for an init that looks at the layers' inputs (EVA)."""

from collections.abc import Callable

from veneer.base.base import Base
from veneer.data.progress import showing
from veneer.train.job import Job


def init_pass(base: Base, job: Job, tokens: int) -> Callable[[], None]:
    """A function that runs the base on the run's first micro-batches, until at least `tokens` tokens were fed."""

    def run() -> None:
        micro_batches = [members for step in job.steps for members in step]
        lengths = [sum(len(job.examples[i]) for i in members) for members in micro_batches]
        enough = next((n for n in range(1, len(lengths)) if sum(lengths[:n]) >= tokens), len(lengths))
        with showing("looking at the training rows: micro-batches", enough) as advance:
            for members in micro_batches[:enough]:
                batch = job.task.batch([job.examples[i] for i in members], base)
                job.task.forward(base, batch, packed=job.recipe.data.packing)
                advance(1)

    return run
