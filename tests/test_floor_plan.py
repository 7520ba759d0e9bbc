"""The floor plan holds: imports go down, optional packages have one door each, and every package used is declared."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part may import the parts of lower floors, and itself.
FLOORS = {
    "__main__": 9,
    "cli": 8,
    "training": 6,
    "evaluation": 6,
    "report": 7,
    "serving": 7,
    "checkpoint": 5,
    "rollout": 5,
    "model": 4,
    "parallel": 3,
    "data": 2,
    "judge": 2,
    "rewards": 1,
    "config": 0,
    "types": 0,
    "timeline": 0,
    "vcr1_kernels": 0,
    "errors": -1,
}
OPTIONAL_PACKAGES = ("apex", "flash_attn", "nvidia", "openai", "sglang", "transformer_engine")
TEXTS = (".md", ".sbatch", ".sh", ".toml", ".txt")
KERNEL_PACKAGES = {"flash_attn", "torch", "triton", "vcr1_kernels"}

# Where the distribution has another name than what is imported.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "megatron": "megatron-core",
    "nvidia": "nvidia-dali-cuda130",
    "transformer_engine": "transformer-engine",
    "triton": "torch",  # comes with it
}
UNDECLARED = {
    "apex",  # this and the next are built against one torch and CUDA: containers and users bring them
    "flash_attn",
    "sglang",  # in an environment of its own
}

PACKAGE_FILES = sorted(chain((ROOT / "megatron_vcr1").rglob("*.py"), (ROOT / "kernels/vcr1_kernels").rglob("*.py")))
PYTHON_FILES = sorted(
    chain(
        ROOT.glob("*.py"),
        *((ROOT / top).rglob("*.py") for top in ("megatron_vcr1", "kernels", "tools", "examples", "tests")),
    )
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def in_package(folder: str) -> pytest.MarkDecorator:
    files = [path for path in PACKAGE_FILES if relative(path).startswith(folder)]
    return pytest.mark.parametrize("path", files, ids=relative)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "kernels" else parts)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of everything that a file of `package` imports, in functions and by importlib too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                origin = resolve_name("." * level + (source or ""), package)
                yield from (f"{origin}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=target), *_]):
                if name in ("import_module", "find_spec", "__import__"):
                    yield str(target)


@cache
def imported(path: Path) -> frozenset[str]:
    package = module_name(path).rpartition(".")[0]
    return frozenset(imports(ast.parse(path.read_text()), package))


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def part(module: str) -> str | None:
    """The room of the floor plan that a module is in; None for the package's root and for third parties."""
    top, *rest = module.split(".")
    if top == "vcr1_kernels":
        return top
    return rest[0] if top == "megatron_vcr1" and rest else None


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import a.b as c", {"a.b"}),
        ("def f():\n    from a.b import c, d", {"a.b.c", "a.b.d"}),
        ("from . import x", {"m.n.x"}),
        ("from ..x import y", {"m.x.y"}),
        ("importlib.import_module('a.b'); find_spec('c')", {"a.b", "c"}),
    ],
)
def test_imports_are_found_wherever_they_stand(source, expected):
    assert set(imports(ast.parse(source), package="m.n")) == expected


@in_package("megatron_vcr1/")
def test_imports_go_down(path):
    home = part(module_name(path))
    if home == "__init__":
        assert not imported(path), "the package's root imports nothing"
        return
    assert home in FLOORS, f"megatron_vcr1/{home} is not on the floor plan: give it a floor"
    climbing = {
        name for name in imported(path) if (room := part(name)) not in (None, home) and FLOORS[room] >= FLOORS[home]
    }
    assert not climbing, f"{home} (floor {FLOORS[home]}) may import lower floors only"


@in_package("kernels/")
def test_kernels_stand_alone(path):
    assert top_level(path) <= KERNEL_PACKAGES | sys.stdlib_module_names


@pytest.mark.parametrize("package", OPTIONAL_PACKAGES)
def test_an_optional_package_has_one_door(package):
    doors = [relative(path) for path in PACKAGE_FILES if package in top_level(path)]
    assert len(doors) <= 1, f"{package} is imported by more than one file"


def declared_packages() -> set[str]:
    """Names of the distributions that setup.py asks for, extras included."""
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    requirements = chain(lists["REQUIREMENTS"], *lists["EXTRAS"].values())
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_every_package_used_is_declared():
    used = set().union(*map(top_level, PACKAGE_FILES)) - sys.stdlib_module_names - {"megatron_vcr1", "vcr1_kernels"}
    undeclared = {DISTRIBUTIONS.get(name, name) for name in used - UNDECLARED} - declared_packages()
    assert not undeclared, "add them to setup.py"


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would hide Hugging Face's package `kernels`"


def test_every_folder_is_packaged():
    missing = {relative(path.parent) for path in PACKAGE_FILES if not (path.parent / "__init__.py").exists()}
    assert not missing, "add an __init__.py: setup.py leaves these folders out of an installation"


def test_files_stay_readable():
    long = {relative(path): lines for path in PYTHON_FILES if (lines := len(path.read_text().splitlines())) > 500}
    assert not long, "would two rooms be clearer?"


def test_no_machine_leaves_its_traces():
    """Paths of a developer's machine have no place in the project; .ci/run alone knows what lies beside the tree."""
    trace = re.compile(r"/[w]ork/|/[r]oot/|\.\.[/]shared|\.[l]ibrary")
    texts = chain(
        PYTHON_FILES,
        *(ROOT.glob(f"{place}*{suffix}") for place in ("", "kernels/", "tools/", "examples/**/") for suffix in TEXTS),
    )
    found = [f"{relative(path)}: {hit[0]}" for path in texts if (hit := trace.search(path.read_text()))]
    assert not found
