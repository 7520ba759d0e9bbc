"""`vcr1 train`, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.config.rendering import render_toml
from tests.training import workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("commands"), num_videos=4)


def _file(folder: Path, stage: str, reward: str | None = None) -> str:
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False, "rewards": [reward] if reward else []}
    data = workspace.config(folder, stage).data.model_dump() | {"sources": [source]}
    config = workspace.config(folder, stage, data=data, checkpoint={"export": "end"})
    path = folder / f"{stage}.toml"
    path.write_text(render_toml(config, documented=False))
    return str(path)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_writes_an_export_and_overrides_take_precedence(folder: Path, tmp_path: Path, stage: str) -> None:
    options = ["--train.run_dir", str(tmp_path / "run"), "--train.num_steps", "1", "--optimizer.learning_rate=1e-5"]
    options += ["--profile", "--profile.first_step", "1"]
    assert main(["train", _file(folder, stage), *options]) == 0
    (row,) = workspace.metrics(tmp_path / "run")
    assert row["lr"] == 1e-5
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoints" / "step_1").is_dir()
    assert "update" in (tmp_path / "run" / "profile" / "rank_0.txt").read_text()


def test_bad_input_exits_with_2_and_a_failing_run_with_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--train.run_dir", str(tmp_path / "run")]
    assert main(["train", str(folder / "nowhere.toml")]) == 2
    assert main(["train", _file(folder, "sft"), *run, "--train.nonsense", "1"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["train", _file(folder, "grpo", "tests.training.own_rewards:raises"), *run]) == 1
    assert "vcr1: stopped: sample train_0" in capsys.readouterr().err
