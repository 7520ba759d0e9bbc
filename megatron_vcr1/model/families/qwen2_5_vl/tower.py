"""The vision tower of Qwen2.5-VL, most layers of which attend within windows."""

from __future__ import annotations

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_vcr1.model.families.base import Grid
from megatron_vcr1.model.families.qwen2_5_vl.family import WindowedVisionConfig
from megatron_vcr1.model.vision import VisionTower, vision_block


def window_order(grid: Grid, config: WindowedVisionConfig) -> tuple[Tensor, tuple[int, ...]]:
    """Sort the merge units of an image or video by attention window.

    Windows tile each temporal step from its top left corner; those at the right and lower edges may be smaller.

    Returns:
        order: int64 [units]; order[i] is the raster index of the i-th unit in window order.
        lengths: number of patches of each window, in window order.
    """
    num_steps, rows, columns = grid[0], grid[1] // config.merge_size, grid[2] // config.merge_size
    side = config.window_size // config.merge_size // config.patch_size  # in merge units
    windows_down, windows_across = -(-rows // side), -(-columns // side)
    step, row, column = torch.meshgrid(
        torch.arange(num_steps), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    window = ((step * windows_down + row // side) * windows_across + column // side).flatten()
    return window.argsort(stable=True), tuple((window.bincount() * config.patches_per_token).tolist())


class WindowedVisionTower(VisionTower):
    """A vision tower whose patches are packed in window order."""

    vision: WindowedVisionConfig

    def build_layers(self, backend: BackendSpecProvider) -> MegatronModule:
        layers = range(1, self.vision.num_layers + 1)
        windowed = frozenset(number for number in layers if number - 1 not in self.vision.full_attention_layers)
        return vision_block(self.config, backend, num_layers=len(layers), windowed_layers=windowed)

    def order_units(self, grid: Grid) -> tuple[Tensor, tuple[int, ...] | None]:
        return window_order(grid, self.vision)
