"""Random models can be loaded and have the size that was announced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcr1.model.presets import PRESETS
from megatron_vcr1.throughput import random_weights
from megatron_vcr1.throughput.random_weights import num_weight_bytes, write_random_model


def test_weights_have_the_announced_size_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "FILE_BYTES", 2_000_000)
    num_bytes = write_random_model(tmp_path / "model", PRESETS["tiny"], dtype=torch.float32)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert num_bytes == sum(tensor.nbytes for tensor in weights.values())
    assert num_bytes == num_weight_bytes(PRESETS["tiny"], torch.float32)
    assert abs(float(weights["model.norm.weight"].mean()) - 1) < 0.05
    assert abs(float(weights["lm_head.weight"].mean())) < 0.01
