"""The pass over the first training rows before training, for an init that looks at the layers' inputs (EVA)."""

from collections.abc import Callable, Sequence
from typing import Any

from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.data.progress import showing
from veneer.train.loss import hidden_states


def looking(
    model: Any, examples: Sequence[Example], plan: Sequence[Sequence[Sequence[int]]], tokens: int, *, packed: bool
) -> Callable[[], None]:
    """A function that runs the model on the first micro-batches of the run, until at least `tokens` tokens were fed."""

    def look() -> None:
        micro_batches = [members for step in plan for members in step]
        lengths = [sum(len(examples[i]) for i in members) for members in micro_batches]
        enough = next((n for n in range(1, len(lengths)) if sum(lengths[:n]) >= tokens), len(lengths))
        with showing("looking at the training rows: micro-batches", enough) as advance:
            for members in micro_batches[:enough]:
                hidden_states(model, collate([examples[i] for i in members]), packed=packed)
                advance(1)

    return look
