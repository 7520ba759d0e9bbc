from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from tests.checkpoint.hf_dirs import random_weights, small_config, write_hf_dir


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """A job of one rank."""
    mesh.initialize(ParallelSection())
    yield
    mesh.shutdown()


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """A Qwen2.5-VL model in two safetensors files."""
    config = small_config()
    return write_hf_dir(tmp_path / "hf", config, random_weights(config))


@pytest.fixture
def imported_dir(hf_dir: Path, tmp_path: Path) -> Path:
    """The import of `hf_dir`."""
    import_checkpoint(hf_dir, tmp_path / "imported")
    return tmp_path / "imported"


@pytest.fixture
def not_durable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that collects violations of the order of fsync and rename.

    It lists everything in a directory that was renamed before it was fsynced, and every parent directory that was not
    fsynced after the rename.
    """
    synced: set[str] = set()
    missing: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.add(path)
        if path in missing:
            missing.remove(path)
        fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        if not target.name.startswith("."):  # hidden before removal
            missing.extend(str(path) for path in (source, *source.rglob("*")) if str(path) not in synced)
        rename(source, target)
        missing.append(str(target.parent))

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    return missing
