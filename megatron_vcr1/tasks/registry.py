"""The tasks by name."""

from __future__ import annotations

from typing import Any

from megatron_vcr1.tasks import (
    captioning,
    grounded_qa,
    multiple_choice_qa,
    quality,
    temporal_grounding,
    tracking,
)
from megatron_vcr1.tasks.base import Task
from megatron_vcr1.tasks.row_fields import shown
from megatron_vcr1.types import Sample

_TASKS: dict[str, Task[Any]] = {
    module.TASK.name: module.TASK
    for module in (temporal_grounding, tracking, grounded_qa, multiple_choice_qa, captioning, quality)
}


class UnknownTaskError(ValueError):
    """Raised for a name that is not the name of a task; the message names the known ones."""


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return tuple(_TASKS)


def find_task(name: str) -> Task[Any]:
    """Return a task by its name. Raises UnknownTaskError."""
    if name not in _TASKS:
        raise UnknownTaskError(f"{shown(name)} is not one of {', '.join(_TASKS)}")
    return _TASKS[name]


def task_of(sample: Sample) -> Task[Any]:
    """Return the task of a sample."""
    task = sample.target.task
    assert isinstance(task, Task)
    return task
