"""The page "A task of your own": its files, written from nothing, train, evaluate and report a new task."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.tasks import registry
from tests.docs.pages import blocks
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("docs")

PAGE = "docs/own_task.md"
SMALL = ["--model.dtype", "float32", "--rollout.engine", "local", "--data.num_workers", "0", "--data.max_frames", "4"]
SMALL += ["--data.total_pixels", "3136", "--data.min_pixels", "784", "--data.templates", "templates.toml"]
SHORT = ["--train.num_steps", "2", "--train.prompts_per_step", "2", "--grpo.group_size", "2"]
SHORT += ["--rollout.max_new_tokens", "4", "--logging.tensorboard", "false"]
ADDED = {"train": [*SMALL, *SHORT], "evaluate": [*SMALL, "--evaluate.max_new_tokens", "4"]}


def files() -> dict[str, str]:
    """The files of the page, by name."""
    page = [block for language in ("python", "toml") for block in blocks(language) if block.page == PAGE]
    return {re.match(r"# file: (\S+)\n", block.text)[1]: block.text for block in page}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, a tiny model and a short prompt for it."""
    path = workspace.create(tmp_path_factory.mktemp("own"), num_videos=1)
    (path / "models").mkdir()
    (path / "model").rename(path / "models/Qwen2.5-VL-7B-Instruct")
    for name, text in files().items():
        (path / name).write_text(text.replace('("train", 400), ("test", 100)', '("train", 6), ("test", 2)'))
    (path / "templates.toml").write_text('[counting]\nanswer = "count: $query"\n')
    return path


def test_the_task_and_its_clips_take_less_than_60_lines() -> None:
    assert sum(text.count("\n") for name, text in files().items() if name.endswith(".py")) < 60


def test_every_command_of_the_page_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (block,) = (block for block in blocks("bash") if block.page == PAGE)
    try:
        for line in block.text.splitlines():
            program, *words = shlex.split(line)
            if program == "python":
                runpy.run_path(words[0])
            else:
                assert main([*words, *ADDED.get(words[0], [])]) == 0, f"{line}\n{capsys.readouterr().err}"
    finally:
        sys.modules.pop("counting", None)
    rows = [json.loads(text) for text in Path("runs/counting/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all("reward/counting/closeness" in row for row in rows)
    metrics = json.loads(Path("runs/counting/evaluation/counting/metrics.json").read_text())["metrics"]
    assert set(metrics) == {"closeness"}
    report = Path("runs/counting/report.html").read_text()
    assert "Counting" in report and "closeness" in report and "&lt;answer&gt;" in report
    assert "cannot be read" not in report


def test_the_reward_of_the_page(folder: Path) -> None:
    closeness = runpy.run_path(str(folder / "counting.py"), run_name="__main__")["closeness"]
    assert [closeness(answer, 3) for answer in ("3", "2", "7", "99")] == [1, 0.75, 0, 0]
