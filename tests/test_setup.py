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
from packaging.version import Version

from megatron_vcr1.parallel.tested_versions import NEWEST_TESTED

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> set[Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


def requirements(*, extras: bool = True) -> list[Requirement]:
    """All requirements of setup.py."""
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return [Requirement(text) for text in chain(lists["REQUIREMENTS"], *(lists["EXTRAS"].values() if extras else ()))]


def test_the_command_for_a_container_installs_everything_but_torch() -> None:
    """docs/cluster.md installs the package with --no-deps, and then its requirements."""
    page = (ROOT / "docs/cluster.md").read_text()
    (command,) = (line for line in page.splitlines() if "--no-deps -e ." in line)
    installed = {Requirement(text) for text in re.findall(r"'([^']+)'", command)}
    assert installed == {requirement for requirement in requirements(extras=False) if requirement.name != "torch"}


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


def pins(constraints: str) -> dict[str, str]:
    """The versions in a constraints file, by package."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tools" / constraints).read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints_newest.txt"])
def test_the_tested_versions_lie_within_the_bounds(constraints: str) -> None:
    tested = pins(constraints)
    outside = {
        str(requirement): tested[name]
        for requirement in requirements()
        if (name := requirement.name.lower().replace("_", "-")) in tested and tested[name] not in requirement.specifier
    }
    assert not outside
    assert len(tested) > 50


def test_a_version_newer_than_the_newest_tested_one_is_warned_about() -> None:
    newest = pins("constraints_newest.txt")
    for package, version in NEWEST_TESTED.items():
        if package in ("torch", "triton"):  # SGLang pins them; newer ones are tested without it
            assert Version(newest[package]) < Version(f"{version}.9")
        elif package in newest:
            assert newest[package].startswith(f"{version}."), package
    bounds = {requirement.name: requirement.specifier for requirement in requirements()}
    for package, version in NEWEST_TESTED.items():
        if package in bounds:
            *major, last = version.split(".")
            following = ".".join([*major, str(int(last) + 1)])
            assert f"{version}.9" in bounds[package] and following not in bounds[package], package
