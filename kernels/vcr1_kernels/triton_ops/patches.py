"""Triton path of `vcr1_kernels.ops.patches`: every byte is read once and every patch value is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.backend import on_its_gpu
from vcr1_kernels.triton_ops import FUSED

_BLOCK_PATCHES = 16


@triton.jit(do_not_specialize=["num_frames", "num_patches", "units_per_column", "units_per_row"])
def _frames_to_patches_kernel(
    frames_ptr,  # uint8 [num_frames, height, width, 3]
    unit_order_ptr,  # int64 [num_units]; not read unless HAS_ORDER
    out_ptr,  # [num_patches, 3, TEMPORAL_PATCH, PATCH, PATCH]
    num_frames,
    num_patches,
    units_per_column,  # merge units from top to bottom
    units_per_row,  # merge units from left to right
    mean_r,  # means and standard deviations in units of 8-bit pixel values (0..255)
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    HAS_ORDER: tl.constexpr,
    PATCH: tl.constexpr,
    TEMPORAL_PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,  # PATCH * PATCH rounded up to a power of two
):
    """Compute (pixel - mean) / std of one channel of one frame, for BLOCK_PATCHES patches.

    Grid: (patch blocks, 3 * TEMPORAL_PATCH). A tile is [BLOCK_PATCHES, BLOCK_PIXELS]. Integer divisions are slow, so
    each of them depends on the patch only or on the pixel only, and the tile shares its result. A division per value
    would take longer than the value's memory traffic.
    """
    channel = tl.program_id(1) // TEMPORAL_PATCH
    frame_in_patch = tl.program_id(1) % TEMPORAL_PATCH
    patches = tl.program_id(0) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    patch_inside = patches < num_patches
    # Where the patch is in the video: merge unit, then its row and column in the grid of patches.
    unit = patches // (MERGE * MERGE)
    if HAS_ORDER:
        unit = tl.load(unit_order_ptr + unit, mask=patch_inside, other=0).to(tl.int32)
    time = unit // (units_per_column * units_per_row)
    patch_y = unit // units_per_row % units_per_column * MERGE + patches // MERGE % MERGE
    patch_x = unit % units_per_row * MERGE + patches % MERGE
    pixels = tl.arange(0, BLOCK_PIXELS)
    inside = patch_inside[:, None] & (pixels < PATCH * PATCH)[None, :]

    width = units_per_row * (MERGE * PATCH)
    height = units_per_column * (MERGE * PATCH)
    frame = tl.minimum(time * TEMPORAL_PATCH + frame_in_patch, num_frames - 1)  # the last frame is repeated
    # 64 bits: a long video has more than 2^31 bytes.
    patch_offsets = (frame.to(tl.int64) * height + patch_y * PATCH) * width + patch_x * PATCH
    pixel_offsets = pixels // PATCH * width + pixels % PATCH
    offsets = (patch_offsets * 3 + channel)[:, None] + (pixel_offsets * 3)[None, :]
    values = tl.load(frames_ptr + offsets, mask=inside, other=0).to(tl.float32)
    mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
    values = (values - mean) / std
    out_offsets = (patches.to(tl.int64) * (3 * TEMPORAL_PATCH) + tl.program_id(1)) * (PATCH * PATCH)
    tl.store(out_ptr + out_offsets[:, None] + pixels[None, :], values.to(out_ptr.dtype.element_ty), mask=inside)


@on_its_gpu
def launch_frames_to_patches(
    frames: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    unit_order: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the patch vectors of contiguous uint8 frames [num_frames, height, width, 3] of a valid size."""
    num_frames, height, width, _ = frames.shape
    units_per_column, units_per_row = height // (patch_size * merge_size), width // (patch_size * merge_size)
    num_patches = triton.cdiv(num_frames, temporal_patch_size) * units_per_column * units_per_row * merge_size**2
    out = torch.empty(num_patches, 3 * temporal_patch_size * patch_size**2, dtype=dtype, device=frames.device)
    if out.numel():
        _frames_to_patches_kernel[(triton.cdiv(num_patches, _BLOCK_PATCHES), 3 * temporal_patch_size)](
            frames,
            frames if unit_order is None else unit_order,
            out,
            num_frames,
            num_patches,
            units_per_column,
            units_per_row,
            *(255 * value for value in mean),
            *(255 * value for value in std),
            HAS_ORDER=unit_order is not None,
            PATCH=patch_size,
            TEMPORAL_PATCH=temporal_patch_size,
            MERGE=merge_size,
            BLOCK_PATCHES=_BLOCK_PATCHES,
            BLOCK_PIXELS=triton.next_power_of_2(patch_size**2),
            **FUSED,
        )
    return out
