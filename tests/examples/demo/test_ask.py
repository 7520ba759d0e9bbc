"""Asking the trained model about a video of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.demo.conftest import RunDemo

pytestmark = pytest.mark.xdist_group("demo")


def test_the_model_answers_about_any_video(out: Path, run_demo: RunDemo) -> None:
    clip = next((out / "data" / "videos").rglob("*.mp4"))
    answered = run_demo("--seeds", "3", "--out", str(out), "--real", str(clip), "--ask", "purple dog")
    assert answered.returncode == 0, answered.stderr
    assert "are not in the tiny vocabulary" in answered.stdout
    assert "prompt tokens" in answered.stdout
    assert (out / "real.png").exists()


def test_an_untrained_model_is_an_error(tmp_path: Path, run_demo: RunDemo) -> None:
    missing = run_demo("--out", str(tmp_path), "--real", "clip.mp4")
    assert missing.returncode == 2
    assert "run `bash tools/demo.sh` first" in missing.stderr
