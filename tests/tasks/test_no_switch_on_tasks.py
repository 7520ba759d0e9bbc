"""Nothing outside of tasks/ may distinguish between tasks: a user's own task could not be added otherwise."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcr1 import tasks
from megatron_vcr1.tasks import find_task, task_names

PACKAGE = Path(__file__).parents[2] / "megatron_vcr1"
ALLOWED = (PACKAGE / "report/paper_tables.py",)  # says which runs belong to which table of the paper
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "tasks") and path not in ALLOWED
)
TARGET_TYPES = {find_task(name).target_type.__name__ for name in task_names()}


def names_in(node: ast.AST) -> set[str]:
    """Return all names, attributes and strings of an expression or pattern."""
    found = set()
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                found.add(name)
    return found


def switches(source: str) -> Iterator[int]:
    """Yield the lines of a program that depend on the type of a target or on the name of a task."""
    kinds = TARGET_TYPES | set(task_names())
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, types]) if names_in(types) & kinds:
                yield node.lineno
            case ast.Compare() if names_in(node) & kinds:
                yield node.lineno
            case ast.Call(func=ast.Name(id="type"), args=[ast.Attribute(attr="target")]):
                yield node.lineno
            case ast.Match(subject=subject, cases=cases):
                if any(names_in(case.pattern) & kinds for case in cases) or names_in(subject) & {"target", "task"}:
                    yield node.lineno


@pytest.mark.parametrize(
    "line",
    [
        "if isinstance(sample.target, TrackingTarget): pass",
        "x = isinstance(target, (Box, tasks.ChoiceTarget | None))",
        "if sample.task == 'tracking': pass",
        "x = 1 if task.name in ('quality', 'captioning') else 2",
        "x = [sample for sample in samples if 'quality' != sample.task]",
        "x = TABLE[type(sample.target)]",
        "match sample.target:\n    case _: pass",
        "match name:\n    case 'quality': pass",
        "match x:\n    case ChoiceTarget(choice): pass",
    ],
)
def test_all_forms_of_switches_are_found(line: str) -> None:
    assert list(switches(line))


@pytest.mark.parametrize(
    "line",
    [
        "target = ChoiceTarget('A')",
        "x = task_of(sample).metrics(sample, output)",
        "if sample.task == benchmark.task: pass",
        "x = Benchmark('vidtab', 'quality')",
    ],
)
def test_what_depends_on_no_task_is_allowed(line: str) -> None:
    assert not list(switches(line))


def test_nothing_outside_of_tasks_switches_on_the_kind_of_task() -> None:
    found = [f"{path.relative_to(PACKAGE)}:{line}" for path in FILES for line in switches(path.read_text())]
    assert not found, "ask the task instead: megatron_vcr1/tasks/base.py is its interface"


def test_every_file_of_tasks_with_a_task_is_registered() -> None:
    files = [path for path in (PACKAGE / "tasks").glob("*.py") if "\nTASK = " in path.read_text()]
    assert {path.stem for path in files} == set(task_names())
    assert {find_task(name).target_type.__name__ for name in task_names()} <= set(tasks.__all__)
