"""Small Hugging Face models with random weights, written with the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import hf_shapes, model_layout

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
_TEXT = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 160,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
_TEXT_3 = {
    "head_dim": 20,
    "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 3, 3], "mrope_interleaved": True},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_VISION = {
    "qwen2_5_vl": {"depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 96},
    "qwen2_vl": {"depth": 2, "embed_dim": 48, "mlp_ratio": 2, "num_heads": 4, "hidden_size": 96},
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 4,
        "out_hidden_size": 96,
        "patch_size": 14,
        "num_position_embeddings": 9,
        "deepstack_visual_indexes": [0],
    },
}


def small_config(family: str = "qwen2_5_vl", *, tied: bool = False) -> dict[str, Any]:
    """Return a config.json in the published format, with two layers, six query heads and two key-value heads."""
    config = {"model_type": family, "tie_word_embeddings": tied}
    if family.startswith("qwen3_vl"):
        text = _TEXT | _TEXT_3 | (_EXPERTS if family == "qwen3_vl_moe" else {})
        return config | {"text_config": text, "vision_config": _VISION["qwen3_vl"]}
    return config | _TEXT | {"vision_config": _VISION[family]}


def random_weights(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return random tensors by the model's published names; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = hf_shapes(model_layout(ModelConfig.from_dict(config)))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in sorted(shapes.items())}


def write_hf_dir(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], *, num_files: int = 2) -> Path:
    """Write a directory like the published ones: safetensors files with an index (or one file), and other files."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text('{"note": "copied as it is"}\n')
    settings = {"patch_size": config["vision_config"].get("patch_size", 14)}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    if num_files == 1:
        safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map: dict[str, str] = {}
    names = list(weights)
    for index in range(num_files):
        file = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        shard = {name: weights[name] for name in names[index::num_files]}
        safetensors.torch.save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(tensor.nbytes for tensor in weights.values())
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Return the content of every file in a directory, by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def file_names(directory: Path) -> list[str]:
    """Return the names of everything in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())
