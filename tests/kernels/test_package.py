"""kernels/ can be installed by itself, and its example runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import megatron_vcr1

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
PROJECT = tomllib.loads((KERNELS / "pyproject.toml").read_text())


def _files(folder: Path) -> set[Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


def test_every_file_is_installed_and_works_without_the_rest(tmp_path: Path) -> None:
    build = ["-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, "-c", "import setuptools; setuptools.setup()", *build], cwd=KERNELS, check=True)
    assert _files(tmp_path / "vcr1_kernels") == _files(KERNELS / "vcr1_kernels")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import runpy; runpy.run_path('examples/loss.py'); "
    code += "import vcr1_kernels; print(vcr1_kernels.__file__); assert 'megatron_vcr1' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=KERNELS, check=True, capture_output=True, text=True)
    printed, file = run.stdout.splitlines()
    better, worse = map(float, re.findall(r"-?\d+\.\d+", printed))
    assert better > -4 and worse < -12  # both start at -log(1000) = -6.9
    assert file == str(tmp_path / "vcr1_kernels" / "__init__.py")


def test_version_and_requirements_are_those_of_the_project() -> None:
    assert PROJECT["project"]["version"] == megatron_vcr1.__version__
    lists = [node for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Assign)]
    (requirements,) = [ast.literal_eval(node.value) for node in lists if node.targets[0].id == "REQUIREMENTS"]  # type: ignore[attr-defined]
    assert set(PROJECT["project"]["dependencies"]) <= set(requirements)
