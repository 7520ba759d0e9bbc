"""What `pip install` brings is the whole of both packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> set[Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


def test_every_file_of_the_packages_is_installed(tmp_path: Path) -> None:
    build = ["-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", *build], cwd=ROOT, check=True)
    assert files(tmp_path / "megatron_vcr1") == files(ROOT / "megatron_vcr1")
    assert files(tmp_path / "vcr1_kernels") == files(ROOT / "kernels/vcr1_kernels")
