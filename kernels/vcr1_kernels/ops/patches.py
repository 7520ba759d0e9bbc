"""Conversion of video frames to the patch vectors that the vision tower of Qwen2-VL reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_shape


def frames_to_patches(
    frames: Tensor,
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    unit_order: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalize uint8 frames and cut them into patch vectors of `temporal_patch_size` frames, in one pass.

    value = (pixel / 255 - mean[channel]) / std[channel]. Patches are in the order of the Hugging Face Qwen2-VL
    processors: time, then merge units (merge_size x merge_size patches) in raster order, then the patches of a unit in
    raster order. The values of a patch are ordered by channel, frame, y, x. If the number of frames is not a multiple
    of temporal_patch_size, the last frame is repeated.

    Args:
        frames: uint8 [num_frames, height, width, 3]; height and width are multiples of patch_size * merge_size.
        patch_size: height and width of a patch in pixels.
        temporal_patch_size: number of consecutive frames in a patch.
        merge_size: height and width of a merge unit in patches.
        mean: mean of each RGB channel, for pixel values in [0, 1].
        std: standard deviation of each RGB channel, for pixel values in [0, 1].
        unit_order: int64 [num_patches / merge_size**2]; the i-th merge unit of the result is unit unit_order[i], for
            example the window order of the vision tower. None: raster order.
        dtype: dtype of the result.

    Returns:
        [num_patches, 3 * temporal_patch_size * patch_size**2] in `dtype`.

    Raises:
        ValueError: frames have another dtype or shape, or unit_order has another length.
    """
    require_shape("frames", frames, "num_frames", "height", "width", 3)
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, got {frames.dtype}")
    num_frames, height, width, _ = frames.shape
    unit_size = patch_size * merge_size
    if height % unit_size or width % unit_size:
        raise ValueError(
            f"frames of {height} x {width} pixels are not multiples of patch_size * merge_size ({unit_size}); resize "
            "them first"
        )
    num_units = -(-num_frames // temporal_patch_size) * (height // unit_size) * (width // unit_size)
    if unit_order is not None:
        require_shape("unit_order", unit_order, num_units)
    if use_triton(frames):
        from vcr1_kernels.triton_ops.patches import launch_frames_to_patches

        return launch_frames_to_patches(
            frames.contiguous(), patch_size, temporal_patch_size, merge_size, tuple(mean), tuple(std), unit_order, dtype
        )
    units = _cut_into_units(frames, patch_size, temporal_patch_size, merge_size)
    if unit_order is not None:
        units = units[unit_order]
    # The permutation above moves single bytes. From here on, the data are contiguous floats that are changed in place.
    patches = units.to(torch.promote_types(dtype, torch.float32)).view(
        num_units * merge_size**2, 3, temporal_patch_size * patch_size**2
    )
    patches -= 255 * patches.new_tensor(mean)[:, None]
    patches /= 255 * patches.new_tensor(std)[:, None]
    return patches.flatten(1).to(dtype)


def _cut_into_units(frames: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int) -> Tensor:
    """Permute uint8 [num_frames, height, width, 3] to uint8 [num_units, values of all patches of the unit]."""
    num_missing = -len(frames) % temporal_patch_size
    if num_missing:
        frames = torch.cat([frames, frames[-1:].expand(num_missing, -1, -1, -1)])
    unit_size = patch_size * merge_size
    num_frames, height, width, _ = frames.shape
    split = frames.reshape(
        num_frames // temporal_patch_size,
        temporal_patch_size,
        height // unit_size,
        merge_size,
        patch_size,
        width // unit_size,
        merge_size,
        patch_size,
        3,
    )
    # -> time, unit y, unit x | patch y, patch x in the unit | channel, frame, pixel y, pixel x
    return split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, merge_size**2 * 3 * temporal_patch_size * patch_size**2)
