"""SFT steps in one process: metrics, unreadable videos and missing reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.training.train import train
from tests.training import workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("sft"), num_videos=6)


def _config(folder: Path, run_dir: Path, *, train: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    keys = {"run_dir": run_dir, "num_steps": 1, "prompts_per_step": 2, **(train or {})}
    return workspace.config(folder, "sft", train=keys, data=data)


def test_downscaled_videos_are_counted(folder: Path, tmp_path: Path) -> None:
    for max_prompt_tokens, num_downscaled in ((60, 2), (4096, 0)):
        run_dir = tmp_path / str(max_prompt_tokens)
        config = _config(folder, run_dir, total_pixels=64 * 28 * 28, max_prompt_tokens=max_prompt_tokens)
        assert train(config) == 0
        assert [row["downscaled_videos"] for row in workspace.metrics(run_dir)] == [num_downscaled]


def test_unreadable_videos_are_replaced_and_listed(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = str(folder / "data" / row["video"])
    rows[0]["video"] = "nowhere.mp4"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"manifest": tmp_path / "train.jsonl", "thinking": False}]
    config = _config(folder, tmp_path / "run", train={"num_steps": None, "num_epochs": 2}, sources=sources)
    assert train(config) == 0
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {row["id"] for row in skipped} == {rows[0]["id"]} and "nowhere.mp4" in skipped[0]["reason"]
    metrics = workspace.metrics(tmp_path / "run")
    assert len(metrics) == -(-2 * len(rows) // 2)
    assert sum(row["skipped_samples"] for row in metrics) == len(skipped) >= 2


def test_prompts_that_ask_for_reasoning_need_samples_with_reasoning(folder: Path, tmp_path: Path) -> None:
    sources = [{"manifest": folder / "data" / "train.jsonl", "thinking": True}]
    with pytest.raises(UserError, match=r"6 of 6 samples have no 'thinking'.*Set thinking = false"):
        train(_config(folder, tmp_path / "run", sources=sources))
