"""The configuration of Qwen3-VL's vision tower."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.config import VisionConfig
from megatron_vcr1.model.families.reading import MAX_LAYERS, check_vision_keys

_PUBLISHED_LAYERS = (8, 16, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VisionConfig(VisionConfig):
    """The vision tower of Qwen3-VL."""

    positions_per_side: int  # the learned positions are a square grid, which is interpolated to the grid of patches
    deepstack_layers: tuple[int, ...]  # 0-based, ascending: language layer i adds the features of the i-th of them


def segment_bounds(vision: Qwen3VisionConfig) -> list[tuple[int, int]]:
    """Return the first layer, and the one after the last, of each segment: a segment ends after a DeepStack layer."""
    ends = [layer + 1 for layer in vision.deepstack_layers]
    bounds = sorted({0, *ends, vision.num_layers})
    return list(pairwise(bounds))


def read_vision_config(raw: Fields, num_text_layers: int) -> Qwen3VisionConfig:
    """Read ``vision_config``.

    Args:
        raw: its keys.
        num_text_layers: number of layers of the language model, which must outnumber the DeepStack features.

    Raises:
        UserError: a key is missing or has a value that is not supported; the message names the key.
    """
    check_vision_keys(raw, hidden_act="gelu_pytorch_tanh")
    num_layers = raw.integer("depth", maximum=MAX_LAYERS)
    num_positions = raw.integer("num_position_embeddings")
    if math.isqrt(num_positions) ** 2 != num_positions:
        raise raw.error("num_position_embeddings", "must be a square number: the positions are a square grid")
    return Qwen3VisionConfig(
        num_layers=num_layers,
        hidden_size=raw.integer("hidden_size"),
        ffn_hidden_size=raw.integer("intermediate_size"),
        num_heads=raw.integer("num_heads"),
        out_hidden_size=raw.integer("out_hidden_size"),
        patch_size=raw.integer("patch_size", 16, maximum=1024),
        temporal_patch_size=raw.integer("temporal_patch_size", 2, maximum=64),
        merge_size=raw.integer("spatial_merge_size", 2, maximum=64),
        normalization="LayerNorm",
        activation="gelu_tanh",
        gated=False,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
        positions_per_side=math.isqrt(num_positions),
        deepstack_layers=_deepstack_layers(raw, num_layers, num_text_layers),
    )


def _deepstack_layers(raw: Fields, num_layers: int, num_text_layers: int) -> tuple[int, ...]:
    key = "deepstack_visual_indexes"
    layers = raw.integers(key, _PUBLISHED_LAYERS)
    if list(layers) != sorted(set(layers)) or any(layer >= num_layers for layer in layers):
        raise UserError(
            f"{raw.where}: {key} is {list(layers)}; it must be an ascending list of layers below depth, which is "
            f"{num_layers}"
        )
    if len(layers) >= num_text_layers:
        raise UserError(
            f"{raw.where}: {key} has {len(layers)} layers, and the language model, whose first layers add their "
            f"features, has {num_text_layers}; it must have more"
        )
    return layers
