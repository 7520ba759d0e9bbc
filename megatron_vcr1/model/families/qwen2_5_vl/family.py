"""Qwen2.5-VL: most layers of its vision tower attend within windows, and a video's positions follow real time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_vcr1.errors import UserError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedVisionConfig(VisionConfig):
    """The vision tower of Qwen2.5-VL."""

    window_size: int  # side of an attention window, in pixels
    full_attention_layers: tuple[int, ...]  # 0-based; the other layers attend within windows
    tokens_per_second: int  # time positions per second of video


@dataclass(frozen=True)
class Qwen25VL(Qwen2Family):
    """Qwen2.5-VL."""

    model_type = "qwen2_5_vl"
    title = "Qwen2.5-VL"

    def read_vision(self, raw: Fields, text_hidden_size: int) -> VisionConfig:
        # Published files omit keys that have the family's default values (depth 32, 16 heads, patches of 2 x 14 x 14).
        check_vision_keys(raw, hidden_act="silu")
        full_attention: tuple[int, ...] = (7, 15, 23, 31)
        if "fullatt_block_indexes" in raw:
            full_attention = raw.integers("fullatt_block_indexes", below=MAX_LAYERS)
        vision = WindowedVisionConfig(
            num_layers=raw.integer("depth", 32, maximum=MAX_LAYERS),
            hidden_size=raw.integer("hidden_size"),
            ffn_hidden_size=raw.integer("intermediate_size"),
            num_heads=raw.integer("num_heads", 16),
            out_hidden_size=raw.integer("out_hidden_size", text_hidden_size),
            patch_size=raw.integer("patch_size", 14, maximum=1024),
            temporal_patch_size=raw.integer("temporal_patch_size", 2, maximum=64),
            merge_size=raw.integer("spatial_merge_size", 2, maximum=64),
            normalization="RMSNorm",
            activation="silu",
            gated=True,
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
            window_size=raw.integer("window_size", 112),
            full_attention_layers=full_attention,
            tokens_per_second=raw.integer("tokens_per_second", 4),
        )
        if vision.window_size < vision.merge_size * vision.patch_size:
            raise UserError(f"{raw.where}: window_size {vision.window_size} is smaller than one merged token")
        return vision

    def vision_blocks(self, vision: VisionConfig, grid: Grid, seconds_per_grid: float | None) -> list[Tensor]:
        tokens_per_second = _checked(vision).tokens_per_second
        return [
            vision_positions(grid, seconds_per_grid, merge_size=vision.merge_size, tokens_per_second=tokens_per_second)
        ]

    def build_vision_tower(
        self, vision: VisionConfig, config: TransformerConfig, backend: BackendSpecProvider
    ) -> VisionTower:
        from megatron_vcr1.model.families.qwen2_5_vl.tower import WindowedVisionTower

        return WindowedVisionTower(_checked(vision), config, backend)

    def vision_pairs(self, vision: VisionConfig, grid: Grid) -> int:
        windowed = _checked(vision)
        num_steps, height, width = grid
        # Side of a window in merge units (squares of patches that become one token).
        side = windowed.window_size // windowed.merge_size // windowed.patch_size
        # The sum over windows of (rows * columns)^2 is a product of two sums, over rows and over columns.
        window_pairs = _sum_of_squares(height // windowed.merge_size, side)
        window_pairs *= _sum_of_squares(width // windowed.merge_size, side) * windowed.patches_per_token**2
        num_full = len(windowed.full_attention_layers)
        return num_steps * (num_full * (height * width) ** 2 + (windowed.num_layers - num_full) * window_pairs)


def _checked(vision: VisionConfig) -> WindowedVisionConfig:
    assert isinstance(vision, WindowedVisionConfig)
    return vision


def _sum_of_squares(length: int, side: int) -> int:
    """Split `length` into parts of `side` and a shorter last one; return the sum of the squares of the parts."""
    num_whole, rest = divmod(length, side)
    return num_whole * side**2 + rest**2
