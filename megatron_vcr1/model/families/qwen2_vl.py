"""Qwen2-VL: a vision tower with LayerNorm and QuickGELU; a video's positions count its temporal patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.config import VisionConfig
from megatron_vcr1.model.families.base import Grid
from megatron_vcr1.model.families.qwen2_common import PIXEL_MEAN, PIXEL_STD, Qwen2Family
from megatron_vcr1.model.families.reading import MAX_LAYERS, check_vision_keys
from megatron_vcr1.model.mrope import vision_positions

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer import TransformerConfig

    from megatron_vcr1.model.vision import VisionTower


@dataclass(frozen=True)
class Qwen2VL(Qwen2Family):
    """Qwen2-VL."""

    model_type = "qwen2_vl"
    title = "Qwen2-VL"

    def read_vision(self, raw: Fields, text_hidden_size: int) -> VisionConfig:
        # Published files omit keys that have the family's default values (depth 32, 16 heads, patches of 2 x 14 x 14).
        check_vision_keys(raw, hidden_act="quick_gelu")
        hidden_size = raw.integer("embed_dim", 1280)
        return VisionConfig(
            num_layers=raw.integer("depth", 32, maximum=MAX_LAYERS),
            hidden_size=hidden_size,
            ffn_hidden_size=int(hidden_size * raw.number("mlp_ratio", 4, below=1000)),
            num_heads=raw.integer("num_heads", 16),
            out_hidden_size=raw.integer("hidden_size", text_hidden_size),  # not the size of the tower, in this file
            patch_size=raw.integer("patch_size", 14, maximum=1024),
            temporal_patch_size=raw.integer("temporal_patch_size", 2, maximum=64),
            merge_size=raw.integer("spatial_merge_size", 2, maximum=64),
            normalization="LayerNorm",
            activation="quick_gelu",
            gated=False,
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
        )

    def vision_blocks(self, vision: VisionConfig, grid: Grid, seconds_per_grid: float | None) -> list[Tensor]:
        return [vision_positions(grid, seconds_per_grid, merge_size=vision.merge_size, tokens_per_second=None)]

    def build_vision_tower(
        self, vision: VisionConfig, config: TransformerConfig, backend: BackendSpecProvider
    ) -> VisionTower:
        from megatron_vcr1.model.vision import VisionTower

        return VisionTower(vision, config, backend)
