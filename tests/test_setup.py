"""The installation: every file of both packages, and requirements whose versions are bounded and tested."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> set[Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


def requirements() -> list[Requirement]:
    """All requirements of setup.py, extras included."""
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return [Requirement(text) for text in chain(lists["REQUIREMENTS"], *lists["EXTRAS"].values())]


def test_every_file_of_the_packages_is_installed(tmp_path: Path) -> None:
    build = ["-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", *build], cwd=ROOT, check=True)
    assert files(tmp_path / "megatron_vcr1") == files(ROOT / "megatron_vcr1")
    assert files(tmp_path / "vcr1_kernels") == files(ROOT / "kernels/vcr1_kernels")


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_has_an_upper_bound(requirement: Requirement) -> None:
    assert any(specifier.operator in ("<", "<=", "==", "~=") for specifier in requirement.specifier), (
        "a release that does not exist yet must not break an installation: give it an upper bound"
    )


def test_the_tested_versions_lie_within_the_bounds() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tools/constraints.txt").read_text(), re.MULTILINE))
    tested = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    outside = {
        str(requirement): tested[name]
        for requirement in requirements()
        if (name := requirement.name.lower().replace("_", "-")) in tested and tested[name] not in requirement.specifier
    }
    assert not outside
    assert len(tested) > 50
