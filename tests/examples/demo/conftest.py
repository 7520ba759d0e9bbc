"""Fixtures of the demo's tests: a quick demo runs once and is shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from demo.data import video_sets, write_manifests
from demo.plan import QUICK_SIZES, ROOT

from tests.limits import HANG_S

RunDemo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_demo() -> RunDemo:
    """A function that runs the demo's program in a new process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(ROOT / "tools"), str(ROOT / "examples")))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-W", "ignore", "-m", "demo", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3 * HANG_S)

    return run


@pytest.fixture(scope="session")
def out(run_demo: RunDemo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a finished quick demo. Tests that use it are marked xdist_group("demo"), to share it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    first = run_demo("--quick", "--seeds", "3", "--workers", "2", "--out", str(out))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "GRPO on three tasks tracks" in first.stdout
    return out


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos and manifests of a quick demo."""
    folder = tmp_path_factory.mktemp("data")
    for videos in video_sets(QUICK_SIZES):
        for part in (0, 1):
            videos.write(folder, part, 2)
    write_manifests(folder, QUICK_SIZES)
    return folder
