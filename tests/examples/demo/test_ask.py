"""Asking the demo's trained model about a video of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.demo.conftest import RunDemo

pytestmark = pytest.mark.xdist_group("demo")


def test_the_model_answers_about_any_video(out: Path, run_demo: RunDemo) -> None:
    clip = next((out / "data" / "videos").rglob("*.mp4"))
    result = run_demo("--seeds", "3", "--out", str(out), "--real", str(clip), "--ask", "purple dog")
    assert result.returncode == 0, result.stderr
    assert "are not in the tiny vocabulary" in result.stdout
    assert "prompt tokens" in result.stdout
    assert (out / "real.png").exists()


def test_an_untrained_model_is_an_error(tmp_path: Path, run_demo: RunDemo) -> None:
    result = run_demo("--out", str(tmp_path), "--real", "clip.mp4")
    assert result.returncode == 2
    assert "run `bash tools/demo.sh` first" in result.stderr
