"""Video frames to the patch vectors that the Qwen2-VL vision tower reads."""

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
    """Normalise uint8 frames, pair them in time and cut them into patch vectors, in one pass.

    Rows are in the order of the Hugging Face Qwen2-VL processors: time, then merge units (merge_size x merge_size
    patches) in raster order, then the patches of a unit; columns are channel, frame of the pair, y, x. If the number of
    frames is not a multiple of temporal_patch_size, the last frame is repeated.

    Args:
        frames: uint8 [num_frames, height, width, 3]; height and width are multiples of patch_size * merge_size.
        mean: of each RGB channel, in units of full scale (0..1).
        std: of each RGB channel, in units of full scale.
        unit_order: int64 [num_patches / merge_size**2]; row block i of the result is merge unit unit_order[i], e.g.
            the vision tower's window order.
        dtype: of the result.

    Returns:
        [num_patches, 3 * temporal_patch_size * patch_size**2] in `dtype`.

    Raises:
        ValueError: frames of another dtype or shape, or a unit order of another length.
    """
    require_shape("frames", frames, "num_frames", "height", "width", 3)
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, got {frames.dtype}")
    num_frames, height, width, _ = frames.shape
    unit_size = patch_size * merge_size
    if height % unit_size or width % unit_size:
        raise ValueError(
            f"frames of {height} x {width} pixels are not multiples of patch_size * merge_size ({unit_size}): resize"
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
    # The permutation above moved single bytes; from here on everything is contiguous and in place.
    patches = units.to(torch.promote_types(dtype, torch.float32)).view(
        num_units * merge_size**2, 3, temporal_patch_size * patch_size**2
    )
    patches -= 255 * patches.new_tensor(mean)[:, None]
    patches /= 255 * patches.new_tensor(std)[:, None]
    return patches.flatten(1).to(dtype)


def _cut_into_units(frames: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int) -> Tensor:
    """uint8 [num_frames, height, width, 3] -> uint8 [num_units, values], all patches of a merge unit in a row."""
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
    # time, unit y, unit x | patch y, patch x in the unit | channel, frame of the pair, y, x
    return split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, merge_size**2 * 3 * temporal_patch_size * patch_size**2)
