"""Frames to the vision tower's patches, in plain PyTorch: a server has no kernels of ours."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vcr1.rollout.sglang.payload import PatchSettings


def to_patches(frames: Tensor, settings: PatchSettings) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalise frames and cut them, in the order in which the published processors do.

    Args:
        frames: uint8 [num_frames, height, width, 3]; an odd last frame is repeated.

    Returns:
        patches: float32 [time * rows * columns, 3 * temporal_patch_size * patch_size ** 2]; merge units stay together.
        grid: patches in time, height and width.
    """
    size, depth, merge = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    missing = -len(frames) % depth
    if missing:
        frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    mean, std = torch.tensor(settings.pixel_mean), torch.tensor(settings.pixel_std)
    pixels = (frames.float() / 255 - mean) / std
    time, rows, columns = len(frames) // depth, frames.shape[1] // size, frames.shape[2] // size
    pixels = pixels.reshape(time, depth, rows // merge, merge, size, columns // merge, merge, size, 3)
    # time, merge unit (row, column), patch in it (row, column) | channel, frame, pixel (row, column)
    pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return pixels.reshape(time * rows * columns, -1), (time, rows, columns)
