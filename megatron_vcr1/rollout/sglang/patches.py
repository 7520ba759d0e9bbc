"""Conversion of frames to vision patches, in plain PyTorch: servers do not have this project's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vcr1.rollout.sglang.payload import PatchSettings


def to_patches(frames: Tensor, settings: PatchSettings) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalize frames and cut them into patches, in the order of the published processors.

    Args:
        frames: uint8 [num_frames, height, width, 3]. If a temporal patch is incomplete, the last frame is repeated.
        settings: patch sizes, and mean and standard deviation of the pixels.

    Returns:
        patches: float32 [time * rows * columns, 3 * temporal_patch_size * patch_size ** 2]; the patches that the merger
            combines into one token are adjacent.
        grid: number of patches in time, height and width.
    """
    size, depth, merge = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    missing = -len(frames) % depth
    if missing:
        frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    mean, std = torch.tensor(settings.pixel_mean), torch.tensor(settings.pixel_std)
    pixels = (frames.float() / 255 - mean) / std
    time, rows, columns = len(frames) // depth, frames.shape[1] // size, frames.shape[2] // size
    pixels = pixels.reshape(time, depth, rows // merge, merge, size, columns // merge, merge, size, 3)
    # Axes of a patch index: time, merge unit (row, column), patch within the unit (row, column); then the values of a
    # patch: channel, frame, pixel (row, column).
    pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return pixels.reshape(time * rows * columns, -1), (time, rows, columns)
