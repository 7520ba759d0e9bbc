from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from tests.checkpoint.hf_dirs import random_weights, small_config, write_hf_dir


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """A Qwen2.5-VL directory of two safetensors files."""
    config = small_config()
    return write_hf_dir(tmp_path / "hf", config, random_weights(config))


@pytest.fixture
def imported_dir(hf_dir: Path, tmp_path: Path) -> Path:
    """`hf_dir`, imported."""
    import_checkpoint(hf_dir, tmp_path / "imported")
    return tmp_path / "imported"


@pytest.fixture
def not_on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with what lies in a directory that gets its name and was not synced before, and with folders that get an
    entry and are not synced behind it.
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
        if not target.name.startswith("."):  # which is on its way out
            missing.extend(str(path) for path in (source, *source.rglob("*")) if str(path) not in synced)
        rename(source, target)
        missing.append(str(target.parent))

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    return missing
