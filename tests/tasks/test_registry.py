from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcr1.config.loading import load_config
from megatron_vcr1.data.rows import sample_from_row
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.rewards import score
from megatron_vcr1.tasks import BUILT_IN_TASKS, UnknownTaskError, find_task, load_tasks, registry, task_names

MODULE = """
from dataclasses import dataclass

from megatron_vcr1.rewards.parsing import last_answer
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks import Target, Task
from megatron_vcr1.tasks.row_fields import TEXT, TargetField


@dataclass(frozen=True, slots=True)
class ColourTarget(Target):
    colour: str


class Colour(Task[ColourTarget]):
    name = "NAME"
    target_type = ColourTarget
    target_fields = (TargetField("colour", TEXT, "the right colour"),)
    answer_prompt = "$query"
    think_prompt = "Think. $query"

    def target_text(self, sample, numbers):
        return f"<answer>{self.target_of(sample).colour}</answer>"

    def reward_parts(self, sample, completion, judged):
        colour = self.target_of(sample).colour
        return {"hue": compute_part(lambda: float(last_answer(completion) == colour), "wrong colour")}


TASK = Colour()
"""


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the tasks, modules and paths that a test has added."""
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    registry._load_entry_points.cache_clear()
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    registry._load_entry_points.cache_clear()


def write_module(folder: Path, name: str, task: str) -> str:
    (folder / f"{name}.py").write_text(MODULE.replace("NAME", task))
    return name


def test_a_module_beside_the_toml_adds_a_task(tmp_path: Path) -> None:
    write_module(tmp_path, "my_colour", "colour")
    (tmp_path / "run.toml").write_text('[model]\npath = "m"\n[data]\ntasks = ["my_colour"]\n')
    data = load_config(tmp_path / "run.toml").data
    assert data.python_path == tmp_path
    load_tasks(data.tasks, data.python_path)
    load_tasks(data.tasks, data.python_path)  # a second time changes nothing
    assert task_names() == (*BUILT_IN_TASKS, "colour") and find_benchmark("colour").task == "colour"
    row = {
        "id": "a",
        "task": "colour",
        "video": "a.mp4",
        "duration_s": None,
        "query": "which?",
        "target": {"colour": "red"},
    }
    sample = sample_from_row(row)
    right, wrong = (score(sample, f"<answer>{colour}</answer>", thinking=False) for colour in ("red", "blue"))
    assert (right.total, right.parts) == (2, {"format": 1, "hue": 1})
    assert wrong.reasons == {"hue": "wrong colour"}
    assert find_task("colour").metrics(sample, "red").values == {"hue": 1}


def test_an_installed_package_adds_a_task_by_an_entry_point(tmp_path: Path) -> None:
    write_module(tmp_path, "colour_package", "colour_of_package")
    info = tmp_path / "colour_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: colour-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megatron_vcr1.tasks]\ncolour = colour_package\n")
    sys.path.append(str(tmp_path))
    assert find_task("colour_of_package").name == "colour_of_package"


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UnknownTaskError, match='"counting" is not one of temporal_grounding, tracking'):
        find_task("counting")


@pytest.mark.parametrize(
    "module, source, message",
    [
        ("absent_module", None, "there is no module absent_module; install it, put it beside the TOML file"),
        ("not a module", None, "'not a module' is not the name of a module"),
        ("half_done", "import absent_inside\n", r"importing half_done failed:\nTraceback(.|\n)*absent_inside"),
        ("faulty", "TASK = 1 / 0\n", r"importing faulty failed:\nTraceback(.|\n)*faulty.py(.|\n)*ZeroDivisionError"),
        ("without_task", "x = 1\n", "has no variable TASK with an instance of megatron_vcr1.tasks.Task"),
        ("twin", MODULE.replace("NAME", "quality"), "there is already a task quality; give yours another name"),
        (
            "no_query",
            MODULE.replace("NAME", "no_query").replace('"$query"', '"$qeury"'),
            "no_query.answer_prompt: placeholder 'query' is missing",
        ),
        (
            "stray",
            MODULE.replace("NAME", "stray").replace('"Think. $query"', '"$ $query"'),
            "stray.think_prompt has a stray dollar sign",
        ),
        (
            "no_tags",
            MODULE.replace("NAME", "no_tags").replace("    answer_", "    tags = ()\n    answer_"),
            "tags is empty",
        ),
        ("bad_name", MODULE.replace("NAME", "my task"), "'my task', is not a word of lower-case letters"),
    ],
)
def test_unusable_modules_are_user_errors(tmp_path: Path, module: str, source: str | None, message: str) -> None:
    if source is not None:
        (tmp_path / f"{module}.py").write_text(source)
    with pytest.raises(UserError, match=message):
        load_tasks([module], tmp_path)
    assert task_names() == BUILT_IN_TASKS


def test_a_target_belongs_to_one_task() -> None:
    quality = type(find_task("quality"))
    with pytest.raises(TypeError, match="QualityTarget belongs to the task quality"):
        type("Mine", (quality,), {"name": "mine"})()
    assert find_task("quality").target_type.task is find_task("quality")
