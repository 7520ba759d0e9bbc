"""The benchmark of whole GRPO steps."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_throughput
import pytest


def test_a_setting_needs_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_throughput.main(["step", "--set", "grpo.group_size"]) == 2
    assert "--set grpo.group_size: write KEY=VALUE" in capsys.readouterr().err


def test_a_step_of_the_tiny_model_is_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # capfd, not capsys: the training process inherits a real stderr.
    out = tmp_path / "step.json"
    sizes = ["--steps", "1", "--prompts", "2", "--response-tokens", "4", "--set", "grpo.group_size=2"]
    assert benchmark_throughput.main(["step", *sizes, "--json", str(out)]) == 0
    assert "GRPO step of the demo's model" in capfd.readouterr().out
    seconds = json.loads(out.read_text())["seconds"]
    assert len(seconds["total"]) == 1 and 0 < seconds["update"][0] < seconds["total"][0]
