"""The interpolated positions against transformers, and the split of the layers into segments."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import vision_utils

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.families.qwen3_vl.config import Qwen3VisionConfig, segment_bounds
from megatron_vcr1.model.families.qwen3_vl.tower import DeepStackTower
from tests.model import tiny

VISION = ModelConfig.from_dict(tiny.hf_config("qwen3_vl").to_dict()).vision
assert isinstance(VISION, Qwen3VisionConfig)


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 4, 14), (2, 48, 8), (1, 100, 60)])
@pytest.mark.parametrize("side", [3, 48])
def test_interpolated_positions_equal_transformers(grid: tuple[int, int, int], side: int) -> None:
    # Neighbours differ by less than 1: a coordinate up to 47 has a rounding error of up to 5e-6 in float32.
    table = torch.rand(side**2, VISION.hidden_size, generator=torch.Generator().manual_seed(0))
    tower = SimpleNamespace(position_embedding=table, vision=dataclasses.replace(VISION, positions_per_side=side))
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    expected = (table[indices] * weights[:, :, None]).sum(1)
    positions = DeepStackTower._positions(tower, *grid[1:]).repeat(grid[0], 1)
    torch.testing.assert_close(positions, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "layers, expected",
    [((0, 2, 3), [(0, 1), (1, 3), (3, 4), (4, 5)]), ((1, 4), [(0, 2), (2, 5)]), ((), [(0, 5)])],
)
def test_a_segment_ends_after_each_deepstack_layer(layers: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert segment_bounds(dataclasses.replace(VISION, deepstack_layers=layers)) == expected
