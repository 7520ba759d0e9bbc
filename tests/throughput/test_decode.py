"""The video-decoding benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_throughput
import pytest

from megatron_vcr1.throughput.decode import summarize
from tests.data.video_clips import write_clip


def test_a_missing_clip_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_throughput.main(["decode", "--videos", "nope.mp4"]) == 2
    assert "--videos nope.mp4: no such file" in capsys.readouterr().err


def test_given_clips_are_read(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    out = tmp_path / "decode.json"
    arguments = ["decode", "--videos", str(clip), "--backends", "pyav", "--rounds", "1", "--json", str(out)]
    assert benchmark_throughput.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["backends"]["pyav"]["frames_per_s"] > 0
    assert result["command"].startswith("vcr1 benchmark decode --videos")


def test_without_clips_a_synthetic_one_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    arguments = ["decode", "--seconds", "1", "--rounds", "1", "--backends", "pyav", "decord2", "--json", str(out)]
    assert benchmark_throughput.main(arguments) == 0
    result = json.loads(out.read_text())
    assert "pyav" in result["backends"] and result["clips"] == ["synthetic.mp4"]
    if "decord2" not in result["backends"]:
        assert "decord2: left out" in capsys.readouterr().err


def test_a_summary_takes_medians_over_rounds_and_sums_over_clips() -> None:
    def reading(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "cpu_seconds": 2 * seconds, "frames": 10, "peak_mb": 100 * seconds, "idle_mb": 1}

    rounds = [[reading(1), reading(1)], [reading(2), reading(2)], [reading(3), reading(5)]]
    assert summarize(rounds) == {
        "clips_per_s": 2 / 4,
        "frames_per_s": 20 / 4,
        "cpu_s_per_clip": 8 / 2,
        "peak_mb": 500,
        "idle_mb": 1,
    }
