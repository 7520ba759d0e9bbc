"""The shapes of the published models and of small ones, as the config.json that their directories hold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_vcr1.model.config import ModelConfig


def _config(
    family: str,
    vision: dict[str, Any],
    *,
    hidden_size: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    mrope: tuple[int, int, int] = (16, 24, 24),
    tied: bool = False,
    token_ids: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Any]:
    name = "Qwen2_5_VL" if family == "qwen2_5_vl" else "Qwen2VL"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": family,
        "hidden_size": hidden_size,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": list(mrope)},
        "tie_word_embeddings": tied,
        "vision_config": {"depth": 32, **vision},
        **token_ids,
    }


def _vision_2_5(out: int, ffn: int = 3420) -> dict[str, Any]:
    tower = {"hidden_size": 1280, "intermediate_size": ffn, "num_heads": 16, "out_hidden_size": out}
    return {**tower, "tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}


def _vision_2(out: int) -> dict[str, Any]:
    return {"embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": out}


_SMALL_TOKENS = {
    "image_token_id": 10,
    "video_token_id": 11,
    "vision_start_token_id": 12,
    "vision_end_token_id": 13,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# "small" and "tiny" are no published models: what a CPU computes in seconds.
PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-3b": _config(
        "qwen2_5_vl",
        _vision_2_5(2048),
        hidden_size=2048,
        ffn=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        vocab=151936,
        tied=True,
    ),
    "qwen2.5-vl-7b": _config(
        "qwen2_5_vl", _vision_2_5(3584), hidden_size=3584, ffn=18944, layers=28, heads=28, kv_heads=4, vocab=152064
    ),
    "qwen2.5-vl-32b": _config(
        "qwen2_5_vl",
        _vision_2_5(5120, 3456),
        hidden_size=5120,
        ffn=27648,
        layers=64,
        heads=40,
        kv_heads=8,
        vocab=152064,
    ),
    "qwen2.5-vl-72b": _config(
        "qwen2_5_vl",
        _vision_2_5(8192, 3456),
        hidden_size=8192,
        ffn=29568,
        layers=80,
        heads=64,
        kv_heads=8,
        vocab=152064,
    ),
    "qwen2-vl-2b": _config(
        "qwen2_vl",
        _vision_2(1536),
        hidden_size=1536,
        ffn=8960,
        layers=28,
        heads=12,
        kv_heads=2,
        vocab=151936,
        tied=True,
    ),
    "qwen2-vl-7b": _config(
        "qwen2_vl", _vision_2(3584), hidden_size=3584, ffn=18944, layers=28, heads=28, kv_heads=4, vocab=152064
    ),
    "small": _config(
        "qwen2_5_vl",
        {**_vision_2_5(512, 704), "depth": 6, "hidden_size": 256, "num_heads": 4, "fullatt_block_indexes": [2, 5]},
        hidden_size=512,
        ffn=1408,
        layers=6,
        heads=8,
        kv_heads=2,
        vocab=32768,
        mrope=(8, 12, 12),
        token_ids=_SMALL_TOKENS,
    ),
    "tiny": _config(
        "qwen2_5_vl",
        {**_vision_2_5(128, 192), "depth": 2, "hidden_size": 64, "num_heads": 4, "fullatt_block_indexes": [1]},
        hidden_size=128,
        ffn=352,
        layers=4,
        heads=4,
        kv_heads=2,
        vocab=2048,
        mrope=(4, 6, 6),
        token_ids=_SMALL_TOKENS,
    ),
}


def add_model_argument(parser: argparse.ArgumentParser, *, default: str) -> None:
    parser.add_argument(
        "--model",
        default=default,
        type=_preset_or_directory,
        metavar="MODEL",
        help=f"one of {', '.join(PRESETS)}, or a directory with a config.json (default: %(default)s)",
    )


def _preset_or_directory(name: str) -> str:
    if name not in PRESETS and not (Path(name) / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{name!r} is none of {', '.join(PRESETS)}, and no directory with a config.json"
        )
    return name


def raw_config(model: str) -> dict[str, Any]:
    """The parsed config.json of a preset, or of a directory."""
    return PRESETS[model] if model in PRESETS else json.loads((Path(model) / "config.json").read_text())


def model_config(model: str) -> ModelConfig:
    """The shape of a preset, or of a directory's model."""
    return ModelConfig.from_dict(PRESETS[model]) if model in PRESETS else ModelConfig.from_pretrained(model)
