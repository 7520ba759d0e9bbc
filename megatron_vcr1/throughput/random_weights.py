"""Writes a Hugging Face directory of any model with random weights: real sizes without a download."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import hf_shapes, model_layout

FILE_BYTES = 500_000_000
STANDARD_DEVIATION = 0.02  # the published models were initialized with it


def write_random_model(
    directory: Path, raw_config: Mapping[str, Any], *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> int:
    """Write config.json and random weights into a new directory, one file at a time.

    The weights of norms are centred at 1, all others at 0.

    Returns:
        The size of all tensors in bytes.
    """
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw_config, indent=1))
    shapes = hf_shapes(model_layout(ModelConfig.from_dict(raw_config)))
    files = _files(shapes, dtype.itemsize)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: _random(name, shapes[name], generator).to(dtype) for name in names}
        safetensors.torch.save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_size = num_weight_bytes(raw_config, dtype)
    index_json = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json))
    return total_size


def num_weight_bytes(raw_config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> int:
    shapes = hf_shapes(model_layout(ModelConfig.from_dict(raw_config)))
    return dtype.itemsize * sum(map(math.prod, shapes.values()))


def _files(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Distribute tensor names over files; a file is full once its tensors exceed `FILE_BYTES`."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if used > FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(name)
        used += itemsize * math.prod(shape)
    return files


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator) * STANDARD_DEVIATION
    is_norm = name.endswith("weight") and len(shape) == 1
    return noise + 1 if is_norm else noise
