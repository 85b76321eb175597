"""The registry of tasks: what is learned, how cases are loaded, and what may be said of the result.

A new task is one file with a :class:`~fedimaging.tasks.base.Task` subclass and one line in ``TASKS``.
"""

from typing import Any

from fedimaging.errors import FedImagingError
from fedimaging.settings import parse
from fedimaging.tasks.base import Item, Task, TaskSettings
from fedimaging.tasks.classification import Classification
from fedimaging.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {"classification": Classification, "segmentation": Segmentation}


def make_task(raw: Any) -> Task:
    """The task of a job's ``{"name": ..., ...}``. Raises FedImagingError by name of the setting at fault."""
    name = raw.get("name") if isinstance(raw, dict) else None
    if not isinstance(name, str) or name not in TASKS:
        raise FedImagingError(f"task.name: not a registered task; choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    return task(parse(task.settings_type, raw, "task"))


__all__ = ["TASKS", "Item", "Task", "TaskSettings", "make_task"]
