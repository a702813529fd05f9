"""The interface of a task: what the training loop, the plan and the evaluation know of what is learned.

A task owns four things: which head the network needs, how a row becomes an example, how examples become a batch, and
the loss of a batch.  A new task is one more file in this folder; TASKS finds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import Any, ClassVar

from torch import Tensor

from veneer.base.base import Base
from veneer.data.example import Example
from veneer.data.pack import Batch, plan_batches
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.registry import Registry


@dataclass
class Loss:
    """The loss of one batch, differentiated through the head; `backward` differentiates the rest of the network."""

    value: float
    """Summed over the supervised positions, in nats."""
    backward: Callable[[], None]


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss over examples that are not trained on."""

    nats: float
    """Summed over all supervised positions."""
    positions: int

    @property
    def mean(self) -> float:
        """Nats per supervised position."""
        return self.nats / max(self.positions, 1)

    @property
    def perplexity(self) -> float:
        """exp(mean); inf where a float cannot hold it."""
        return exp(self.mean) if self.mean < 709 else inf


class Task(ABC):
    """One kind of thing to learn."""

    metrics: ClassVar[tuple[str, ...]]
    """What an evaluation measures by default."""

    @abstractmethod
    def refuse_base(self, base: Base, what: str) -> None:
        """Raise ModelError if the network lacks the head that the task needs; `what` is to be trained on it."""

    @abstractmethod
    def renderer(self, tokenizer: Any, settings: DataSettings, max_length: int) -> Renderer:
        """Turns rows into examples."""

    @abstractmethod
    def batch(self, examples: Sequence[Example], base: Base, *, rounded: bool = False) -> Batch:
        """Tensors on the base's device; `rounded`: filled up to a multiple of tokens, so that shapes are few."""

    @abstractmethod
    def forward(self, base: Base, batch: Batch, *, packed: bool) -> Tensor:
        """The network's outputs that the loss is computed from, (M, D) at the batch's M supervised positions.

        packed    the batch holds several documents, each attended to alone
        """

    @abstractmethod
    def loss(self, base: Base, batch: Batch, divisor: int, *, packed: bool, lean: bool = False) -> Loss:
        """Forward pass and the head's backward pass, of the summed loss / divisor; `lean` returns freed memory."""

    @abstractmethod
    def summed_loss(self, base: Base, batch: Batch, *, packed: bool) -> Tensor:
        """The loss of a batch summed over its supervised positions, in nats; no gradient is kept."""

    @abstractmethod
    def selftest(self, base: Base, examples: Sequence[Example], *, packed: bool) -> None:
        """Raise ModelError if `loss` does not agree with the network's own outputs on the first examples."""

    def held_out_loss(
        self,
        base: Base,
        examples: Sequence[Example],
        *,
        packed: bool,
        max_length: int,
        micro_batch_tokens: int | None = None,
        done: Callable[[int], object] = lambda _: None,
    ) -> HeldOutLoss:
        """Measure the base, with whatever adapters are attached, on examples; `done` is told how many more are."""
        nats, positions = 0.0, 0
        with base.evaluating():
            for members in held_out_batches(
                examples, packed=packed, max_length=max_length, micro_batch_tokens=micro_batch_tokens
            ):
                batch = self.batch([examples[i] for i in members], base)
                nats += float(self.summed_loss(base, batch, packed=packed))
                positions += len(batch.targets)
                done(len(members))
        return HeldOutLoss(nats, positions)


TASKS: Registry[type[Task]] = Registry("task")


def held_out_batches(
    examples: Sequence[Example], *, packed: bool, max_length: int, micro_batch_tokens: int | None = None
) -> list[list[int]]:
    """Numbers of the held-out examples that are computed together."""
    steps = plan_batches(
        [len(e) for e in examples],
        max_length=max_length,
        tokens_per_step=8 * max_length,
        micro_batch_tokens=micro_batch_tokens,
        seed=0,
        epoch=0,
        packing=packed,
    )
    return [members for step in steps for members in step]
