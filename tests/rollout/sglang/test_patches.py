"""Compares the servers' conversion of frames to patches with the published processors."""

from __future__ import annotations

import pytest
import torch

from megatron_vcr1.rollout.sglang.patches import to_patches
from megatron_vcr1.rollout.sglang.payload import PatchSettings
from tests.model import tiny

SETTINGS = PatchSettings(14, 2, 2, tiny.MEAN, tiny.STD)


@pytest.mark.parametrize("num_frames", [1, 4, 6])
def test_patches_equal_those_of_the_published_processors(num_frames: int) -> None:
    item = tiny.vision_input(torch.Generator().manual_seed(0), num_frames, 4, 6, 1.0)
    patches, grid = to_patches(item.frames, SETTINGS)
    assert grid == item.grid_thw
    torch.testing.assert_close(patches, tiny._pixel_values(item))


def test_the_last_frame_of_an_odd_number_is_repeated() -> None:
    frames = torch.randint(0, 256, (3, 28, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches, grid = to_patches(frames, SETTINGS)
    even, even_grid = to_patches(torch.cat((frames, frames[-1:])), SETTINGS)
    assert grid == even_grid == (2, 2, 4)
    assert torch.equal(patches, even)
