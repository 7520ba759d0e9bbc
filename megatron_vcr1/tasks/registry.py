"""The tasks by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import (
    captioning,
    free_form,
    grounded_qa,
    multiple_choice_qa,
    numeric,
    quality,
    temporal_grounding,
    tracking,
)
from megatron_vcr1.tasks.base import Task
from megatron_vcr1.tasks.row_fields import shown
from megatron_vcr1.types import Sample
from megatron_vcr1.user_modules import import_user_module, make_importable

_TASKS: dict[str, Task[Any]] = {
    module.TASK.name: module.TASK
    for module in (
        temporal_grounding,
        tracking,
        grounded_qa,
        multiple_choice_qa,
        captioning,
        quality,
        numeric,
        free_form,
    )
}


BUILT_IN_TASKS = tuple(_TASKS)
"""The names of the tasks of this package."""

ENTRY_POINTS = "megatron_vcr1.tasks"
"""Group of the entry points of installed packages; each names a module with a variable TASK."""


class UnknownTaskError(ValueError):
    """Raised for a name that is not the name of a task; the message names the known ones."""


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, those of installed packages and of loaded modules last."""
    _load_entry_points()
    return tuple(_TASKS)


def find_task(name: str) -> Task[Any]:
    """Return a task by its name. Raises UnknownTaskError."""
    if name not in _TASKS:
        _load_entry_points()
    if name not in _TASKS:
        raise UnknownTaskError(f"{shown(name)} is not one of {', '.join(_TASKS)}")
    return _TASKS[name]


def task_of(sample: Sample) -> Task[Any]:
    """Return the task of a sample."""
    task = sample.target.task
    assert isinstance(task, Task)
    return task


def load_tasks(modules: Iterable[str], folder: Path | None = None) -> None:
    """Import the modules of the user's tasks and register their tasks.

    Args:
        modules: names of the modules; each has a variable TASK.
        folder: a folder from which they can be imported.

    Raises:
        UserError: a module cannot be imported, has no TASK, or its task has the name of another one.
    """
    make_importable(folder)
    for name in modules:
        _register(import_user_module(name, f"task module {name!r}"), f"task module {name!r}")


@cache
def _load_entry_points() -> None:
    """Register the tasks of installed packages, once."""
    for entry_point in entry_points(group=ENTRY_POINTS):
        what = f"entry point {entry_point.name!r} of {entry_point.dist.name if entry_point.dist else 'a package'}"
        _register(import_user_module(entry_point.module, what), what)


def _register(module: ModuleType, what: str) -> None:
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise UserError(f"{what}: the module has no variable TASK with an instance of megatron_vcr1.tasks.Task; add it")
    if _TASKS.setdefault(task.name, task) is not task:
        raise UserError(f"{what}: there is already a task {task.name}; give yours another name")
