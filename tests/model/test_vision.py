"""Window order and patch coordinates against transformers; test_video_language_model.py compares the tower."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import vision_utils

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.families.qwen2_5_vl.tower import window_order
from megatron_vcr1.model.vision import join_inputs, patch_coordinates, rotary_angles
from tests.model import tiny

VISION = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict()).vision
GRIDS = [(1, 2, 2), (1, 10, 6), (3, 4, 14), (2, 16, 8), (1, 2, 18), (5, 4, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("window_size", [28, 56, 112])
def test_window_order_equals_transformers(grid: tuple[int, int, int], window_size: int) -> None:
    order, lengths = window_order(grid, dataclasses.replace(VISION, window_size=window_size))
    expected_order, boundaries = vision_utils.get_vision_window_index(
        torch.tensor([grid]), spatial_merge_size=2, window_size=window_size, patch_size=14
    )
    assert torch.equal(order, expected_order)
    assert list(lengths) == boundaries.diff().tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_patch_coordinates_equal_transformers(grid: tuple[int, int, int]) -> None:
    expected = vision_utils.get_vision_position_ids(torch.tensor([grid]), 2)
    assert torch.equal(patch_coordinates(grid, 2).flatten(0, 1), expected)


def test_half_of_the_rotary_angles_follow_the_row_and_half_the_column() -> None:
    angles = rotary_angles(torch.tensor([[3, 5]]), head_dim=8)[0]
    torch.testing.assert_close(angles, torch.tensor([3.0, 0.03, 5.0, 0.05]).repeat(2))


def test_neighbouring_inputs_of_one_size_become_one_video() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 2, 4), (6, 2, 4), (1, 2, 4), (1, 2, 4), (4, 4, 2), (2, 4, 2)]  # frames, patches down and across
    inputs = [tiny.vision_input(generator, *shape, seconds=1.0) for shape in shapes]
    result = join_inputs(inputs, temporal_patch_size=2)
    assert [item.grid_thw for item in result] == [(5, 2, 4), (1, 2, 4), (1, 2, 4), (3, 4, 2)]
    assert torch.equal(torch.cat([item.frames for item in result[:1]]), torch.cat([item.frames for item in inputs[:2]]))
    assert result[1] is inputs[2]


@pytest.mark.parametrize("window_size", [28, 56])
def test_a_joined_video_has_the_windows_of_its_parts(window_size: int) -> None:
    vision = dataclasses.replace(VISION, window_size=window_size)
    (first, lengths_first), (second, lengths_second) = window_order((2, 4, 6), vision), window_order((3, 4, 6), vision)
    order, lengths = window_order((5, 4, 6), vision)
    assert torch.equal(order, torch.cat((first, second + len(first))))
    assert lengths == lengths_first + lengths_second
