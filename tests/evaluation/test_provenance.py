from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_vcr1.evaluation.provenance import differences_from_training, training_of, training_run_of
from megatron_vcr1.evaluation.trained_run import open_run
from tests.evaluation.test_trained_run import make_run


def test_the_training_of_an_export_or_checkpoint_is_found(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path, steps=(3,), exported=3))
    for model in ("export", "export/step_3", "checkpoints/step_3"):
        assert training_run_of(run.path / model) == run.path
    assert training_of(run.path) == run.config
    assert training_run_of(tmp_path / "model") is None
    (tmp_path / "newest").symlink_to(run.path / "export")
    assert training_run_of(tmp_path / "newest") == run.path.resolve()
    (run.path / "metrics.jsonl").touch()
    shutil.rmtree(run.path / "checkpoints")
    assert training_run_of(run.path / "export") == run.path


def test_settings_of_a_training_that_cannot_be_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = make_run(tmp_path, steps=(3,))
    (run_dir / "config.toml").write_text("[model]\nsize = 3\n")
    assert training_of(run_dir) is None
    assert f"cannot be compared with those of the model's training: {run_dir / 'config.toml'}" in caplog.text


def test_differences_from_the_training_are_described(tmp_path: Path) -> None:
    training = open_run(make_run(tmp_path, steps=(3,))).config
    assert differences_from_training(training, training.data, thinking=False) == []
    assert differences_from_training(training, training.data, thinking=True) == [
        "asks with thinking, but the model was trained without thinking"
    ]
    other = training.data.model_copy(update={"templates": None, "fps": 1.0, "num_workers": 9})
    assert differences_from_training(training, other, thinking=False) == [
        f"templates default, but the model was trained with {tmp_path / 'templates.toml'}",
        "data.fps = 1.0 (training: 2.0)",
    ]
    copy = tmp_path / "copy.toml"
    copy.write_bytes((tmp_path / "templates.toml").read_bytes())
    same = training.data.model_copy(update={"templates": copy})
    assert differences_from_training(training, same, thinking=False) == []
