"""A tiny model with a video, and the examples as modules."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.training import workspace

FOLDER = Path(__file__).parents[3] / "examples/library"
LoadExample = Callable[[str], ModuleType]


@pytest.fixture(scope="session")
def load_example() -> LoadExample:
    """Imports an example as a module; examples/library is no package."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"library_example_{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, data/train.jsonl and its videos, and templates.toml."""
    return workspace.create(tmp_path_factory.mktemp("library"), num_videos=2)
