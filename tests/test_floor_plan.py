"""The floor plan: imports go down only, one file imports each optional package, and dependencies are declared."""

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

# A package may import itself and packages with a lower number.
FLOORS = {
    "__main__": 11,
    "cli": 10,
    "throughput": 9,
    "training": 8,
    "evaluation": 7,
    "report": 8,
    "serving": 8,
    "checkpoint": 6,
    "rollout": 6,
    "planning": 6,
    "model": 5,
    "parallel": 4,
    "data": 3,
    "judge": 3,
    "tasks": 2,
    "rewards": 1,
    "config": 0,
    "types": 0,
    "timeline": 0,
    "vcr1_kernels": 0,
    "json_fields": 0,
    "command_line": 0,
    "process_memory": 0,
    "text_files": -1,
    "user_modules": -1,
    "user_paths": -1,
    "errors": -2,
}
OPTIONAL_PACKAGES = ("apex", "flash_attn", "nvidia", "openai", "rouge_score", "sglang", "transformer_engine")
TEXTS = (".md", ".sbatch", ".sh", ".toml", ".txt")
KERNEL_PACKAGES = {"flash_attn", "torch", "triton", "vcr1_kernels"}

# Import names whose distribution has a different name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "megatron": "megatron-core",
    "nvidia": "nvidia-dali-cuda130",
    "rouge_score": "rouge-score",
    "transformer_engine": "transformer-engine",
    "triton": "torch",  # a dependency of torch
}
UNDECLARED = {
    "apex",  # apex and flash_attn are built for one version of torch and CUDA, by containers and users
    "flash_attn",
    "datasets",  # comes with trl, and tokenizers with transformers
    "tokenizers",
    "decord",  # `vcr1 benchmark decode` measures these alternatives if they are installed
    "qwen_vl_utils",
    "torchcodec",
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
    """Yield the dotted names of all imports of a file of `package`, including those in functions and by importlib."""
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
    """Return the package of the floor plan that contains a module; None for the root package and other projects."""
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
def test_all_forms_of_imports_are_found(source, expected):
    assert set(imports(ast.parse(source), package="m.n")) == expected


@in_package("megatron_vcr1/")
def test_imports_go_down(path):
    home = part(module_name(path))
    if home == "__init__":
        assert not imported(path), "the root package must import nothing"
        return
    assert home in FLOORS, f"megatron_vcr1/{home} is not in FLOORS: give it a floor"
    upward = {
        name for name in imported(path) if (other := part(name)) not in (None, home) and FLOORS[other] >= FLOORS[home]
    }
    assert not upward, f"{home} (floor {FLOORS[home]}) may import from lower floors only"


@in_package("kernels/")
def test_kernels_import_only_torch_and_triton(path):
    assert top_level(path) <= KERNEL_PACKAGES | sys.stdlib_module_names


@pytest.mark.parametrize("package", OPTIONAL_PACKAGES)
def test_an_optional_package_is_imported_by_one_file(package):
    # `vcr1 benchmark` measures some of them as alternatives, in modules of its own.
    files = [path for path in PACKAGE_FILES if not relative(path).startswith("megatron_vcr1/throughput/")]
    importers = [relative(path) for path in files if package in top_level(path)]
    assert len(importers) <= 1, f"{package} is imported by more than one file"


def declared_packages() -> set[str]:
    """Return the names of the distributions that setup.py requires, including extras."""
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    requirements = chain(lists["REQUIREMENTS"], *lists["EXTRAS"].values())
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_every_imported_package_is_declared():
    used = set().union(*map(top_level, PACKAGE_FILES)) - sys.stdlib_module_names - {"megatron_vcr1", "vcr1_kernels"}
    undeclared = {DISTRIBUTIONS.get(name, name) for name in used - UNDECLARED} - declared_packages()
    assert not undeclared, "add them to setup.py"


def test_the_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would hide Hugging Face's package `kernels`"


def test_every_folder_is_packaged():
    missing = {relative(path.parent) for path in PACKAGE_FILES if not (path.parent / "__init__.py").exists()}
    assert not missing, "add an __init__.py: setup.py leaves these folders out of an installation"


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in PYTHON_FILES}
    long = {
        relative(path): lines
        for path, lines in lengths.items()
        if lines > (450 if relative(path).startswith("tests/") else 400)
    }
    assert not long, "split these files"


def test_functions_are_short():
    long = {
        f"{relative(path)}:{node.lineno} {node.name}": lines
        for path in PYTHON_FILES
        if not relative(path).startswith("tests/")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 80
    }
    assert not long, "split these functions"


def test_no_file_contains_a_developers_paths():
    """Only .ci/run may refer to folders outside of the project."""
    developer_path = re.compile(r"/[w]ork/|/[r]oot/|\.\.[/]shared|\.[l]ibrary")
    texts = chain(
        PYTHON_FILES,
        *(ROOT.glob(f"{place}*{suffix}") for place in ("", "kernels/", "tools/", "examples/**/") for suffix in TEXTS),
    )
    found = [f"{relative(path)}: {hit[0]}" for path in texts if (hit := developer_path.search(path.read_text()))]
    assert not found
