"""Shapes of the published models and of small test models, in the format of Hugging Face's config.json.

`vcr1 --help` lists them, so this module imports nothing that is slow to load.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


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


def _qwen2_5(vocab: int, vision_ffn: int = 3420, **language: Any) -> dict[str, Any]:
    return _config("qwen2_5_vl", _vision_2_5(language["hidden_size"], vision_ffn), vocab=vocab, **language)


def _vision_2_5(out: int, ffn: int) -> dict[str, Any]:
    tower = {"hidden_size": 1280, "intermediate_size": ffn, "num_heads": 16, "out_hidden_size": out}
    return {**tower, "tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}


def _qwen2(vocab: int, **language: Any) -> dict[str, Any]:
    tower = {"embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": language["hidden_size"]}
    return _config("qwen2_vl", tower, vocab=vocab, **language)


def _qwen3(
    hidden_size: int, ffn: int, *, layers: int, heads: int, kv_heads: int = 8, tied: bool = False
) -> dict[str, Any]:
    """Return a Qwen3-VL configuration; the models with tied embeddings have the smaller vision tower."""
    tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    if tied:
        tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": hidden_size,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **tower,
        },
        "tie_word_embeddings": tied,
    }


def _qwen3_moe(hidden_size: int, ffn: int, *, expert_ffn: int, layers: int, heads: int) -> dict[str, Any]:
    """Return a Qwen3-VL configuration with 128 experts, 8 of them for each token, in every layer."""
    dense = _qwen3(hidden_size, ffn, layers=layers, heads=heads, kv_heads=4)
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert_ffn,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return dense | {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "text_config": dense["text_config"] | {"model_type": "qwen3_vl_moe_text"} | experts,
        "vision_config": dense["vision_config"] | {"model_type": "qwen3_vl_moe"},
    }


def _test_model(vision_ffn: int, vision: dict[str, Any], **language: Any) -> dict[str, Any]:
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    token_ids = {"bos_token_id": 0, "eos_token_id": 1} | {name: 10 + index for index, name in enumerate(special)}
    tower = _vision_2_5(language["hidden_size"], vision_ffn) | {"num_heads": 4} | vision
    return _config("qwen2_5_vl", tower, token_ids=token_ids, **language)


SEVEN_B = {"hidden_size": 3584, "ffn": 18944, "layers": 28, "heads": 28, "kv_heads": 4}

# "small" and "tiny" are not published: a CPU computes their updates in seconds.
PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-vl-2b": _qwen3(2048, 6144, layers=28, heads=16, tied=True),
    "qwen3-vl-4b": _qwen3(2560, 9728, layers=36, heads=32, tied=True),
    "qwen3-vl-8b": _qwen3(4096, 12288, layers=36, heads=32),
    "qwen3-vl-32b": _qwen3(5120, 25600, layers=64, heads=64),
    "qwen3-vl-30b-a3b": _qwen3_moe(2048, 6144, expert_ffn=768, layers=48, heads=32),
    "qwen3-vl-235b-a22b": _qwen3_moe(4096, 12288, expert_ffn=1536, layers=94, heads=64),
    "qwen2.5-vl-3b": _qwen2_5(151936, hidden_size=2048, ffn=11008, layers=36, heads=16, kv_heads=2, tied=True),
    "qwen2.5-vl-7b": _qwen2_5(152064, **SEVEN_B),
    "qwen2.5-vl-32b": _qwen2_5(152064, 3456, hidden_size=5120, ffn=27648, layers=64, heads=40, kv_heads=8),
    "qwen2.5-vl-72b": _qwen2_5(152064, 3456, hidden_size=8192, ffn=29568, layers=80, heads=64, kv_heads=8),
    "qwen2-vl-2b": _qwen2(151936, hidden_size=1536, ffn=8960, layers=28, heads=12, kv_heads=2, tied=True),
    "qwen2-vl-7b": _qwen2(152064, **SEVEN_B),
    "small": _test_model(
        704,
        {"depth": 6, "hidden_size": 256, "fullatt_block_indexes": [2, 5]},
        hidden_size=512,
        ffn=1408,
        layers=6,
        heads=8,
        kv_heads=2,
        vocab=32768,
        mrope=(8, 12, 12),
    ),
    "tiny": _test_model(
        192,
        {"depth": 2, "hidden_size": 64, "fullatt_block_indexes": [1]},
        hidden_size=128,
        ffn=352,
        layers=4,
        heads=4,
        kv_heads=2,
        vocab=2048,
        mrope=(4, 6, 6),
    ),
}
