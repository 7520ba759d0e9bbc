from __future__ import annotations

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
