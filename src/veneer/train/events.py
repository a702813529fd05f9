"""The events of a run, for listeners: the event log, a progress bar, TensorBoard."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """One step, one restart before the next, or one evaluation (`kind`), with its figures under plain names."""

    kind: str
    step: int
    """Steps done."""
    steps: int
    """Steps in all."""
    figures: dict[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """The event as one flat object."""
        return {"event": self.kind, "step": self.step, "steps": self.steps, **self.figures}


Listener = Callable[[Event], None]


def tensorboard(folder: Path, *, after: int = 0) -> Listener | None:
    """Writes every figure to TensorBoard, or None if it is not installed (`pip install veneer[tensorboard]`).

    after   the step that the run resumes from: earlier records of later steps are hidden
    """
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(event: Event) -> None:
        for name, value in event.figures.items():
            flat = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            for tag, number in flat.items():
                writer.add_scalar(f"{event.kind}/{tag}", number, event.step)
        writer.flush()

    return write
