"""What is learned and how it is scored: one file per task, registered in TASKS."""

from veneer.registry import import_siblings
from veneer.tasks.base import TASKS, Task

import_siblings(__name__, list(__path__))

__all__ = ["TASKS", "Task"]
