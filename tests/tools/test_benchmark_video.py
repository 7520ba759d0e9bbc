"""tools/benchmark_video.py end to end, on a second of video."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_results_are_written_as_json(tmp_path: Path) -> None:
    options = ["--seconds", "1", "--repeats", "1", "--backends", "pyav", "--json", tmp_path / "video.json"]
    subprocess.run([sys.executable, ROOT / "tools" / "benchmark_video.py", *options], check=True, timeout=300)
    report = json.loads((tmp_path / "video.json").read_text())
    assert set(report["backends"]) == {"pyav"}
