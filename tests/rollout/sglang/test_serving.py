"""Tests of `vcr1 rollout serve` without SGLang; conftest.py runs it with a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    config = RunConfig.model_validate({"model": {"path": tmp_path / "model"}, "train": {"run_dir": tmp_path / "run"}})
    (tmp_path / "run.toml").write_text(render_toml(config, documented=False))
    return tmp_path / "run.toml"


def interpreter(folder: Path, command: str) -> Path:
    """Create an interpreter that runs a shell command instead."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return path


def test_missing_sglang_is_reported_before_anything_is_started(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = interpreter(run.parent, 'exec python3 -I -S "$@"')  # no packages
    command = ["rollout", "serve", str(run), "--sglang.python", str(without), "--host", "0.0.0.0"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"sglang is not installed for {without}" in message and "'sglang>=0.5.23" in message
    assert not (run.parent / "run" / "sglang").exists()


def test_a_missing_interpreter_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", "serve", str(run), "--sglang.python", str(run.parent / "nowhere")]) == 2
    assert "sglang.python: " in capsys.readouterr().err
