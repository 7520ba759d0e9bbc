"""Checkpoints of one megatron-core load with another, bit for bit, in both directions.

Runs where both environments of tools/venv.sh exist: `.venv`, with the oldest supported megatron-core, and
`.venv-newest`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.checkpoint import other_versions
from tests.model import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def other_python() -> Path:
    """Return the interpreter of the environment that does not run these tests."""
    for folder in (ROOT / ".venv", ROOT / ".venv-newest"):
        python = folder / "bin/python"
        if folder.resolve() != Path(sys.prefix).resolve() and (folder / "installed.sha256").exists():
            return python
    pytest.skip("only one of .venv and .venv-newest is installed")


def test_checkpoints_of_another_megatron_core_load_bit_for_bit(
    single_process: None, other_python: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    tiny.create("qwen2_vl", model_dir)
    ours = other_versions.save(model_dir, tmp_path / "ours")
    folders = [str(tmp_path / name) for name in ("model", "ours", "theirs")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    process = subprocess.run(
        [other_python, "-m", "tests.checkpoint.other_versions", *folders],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    other = json.loads(process.stdout.splitlines()[-1])
    assert other["megatron-core"] != version("megatron-core")
    assert other["loaded"] == ours and len(ours) > 50
    assert other_versions.load(model_dir, tmp_path / "theirs") == other["saved"]
