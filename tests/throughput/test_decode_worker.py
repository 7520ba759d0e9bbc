"""The process that reads clips with one backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_vcr1.throughput import decode_worker
from tests.data.video_clips import write_clip
from tests.limits import HANG_S


def test_readings_are_json_lines(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    command = [sys.executable, decode_worker.__file__, "pyav", "1"]
    done = subprocess.run(
        command, input=f"{clip}\n{clip}\n", capture_output=True, text=True, check=True, timeout=HANG_S
    )
    installed, first, second = map(json.loads, done.stdout.splitlines())
    assert installed == {"missing": None}
    assert first["frames"] == second["frames"] > 1
    assert 0 < second["idle_mb"] <= second["peak_mb"]
