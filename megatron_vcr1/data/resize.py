"""Frame sizes by the rules of Qwen-VL, and the resizing of frames to them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ASPECT_RATIO = 200
PIXELS_PER_TOKEN = 28 * 28
"""Number of pixels that one language-model token covers in Qwen2-VL and Qwen2.5-VL."""
MAX_FRAME_PIXELS = 768 * PIXELS_PER_TOKEN
"""Largest number of pixels of a video frame of Qwen2-VL and Qwen2.5-VL, also in a video of few frames."""
TEMPORAL_PATCH_SIZE = 2
"""Number of frames that share their tokens, in all published models."""


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return a size close to the original, with sides that are multiples of `factor` and an area within the bounds.

    Args:
        height, width: original size in pixels.
        factor: patch_size * merge_size; one language-model token covers factor x factor pixels.
        min_pixels, max_pixels: bounds on the area after resizing. A side is never smaller than `factor`, so an image of
            extreme aspect ratio may exceed `max_pixels`.

    Returns:
        Height and width.

    Raises:
        ValueError: the aspect ratio is over 200, or the bounds are not 0 < min_pixels <= max_pixels.
    """
    return _resize_within(1, 1, height, width, factor, min_pixels, max_pixels)


def smart_resize_video(
    num_frames: int, height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return a frame size with which all frames of a video together have an area within the bounds.

    This is the rule of Qwen3-VL. It counts the frames in whole temporal patches, rounded to the nearest number and not
    up, so the patches of 5 frames may exceed `max_pixels` by a half.

    Args:
        num_frames: number of frames, at least 2.
        height, width, factor: as for `smart_resize`.
        min_pixels, max_pixels: bounds on the area of all frames together after resizing.

    Returns:
        Height and width.

    Raises:
        ValueError: the aspect ratio is over 200, or the bounds are not 0 < min_pixels <= max_pixels.
    """
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    counted_frames = round(num_frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE
    return _resize_within(num_frames, counted_frames, height, width, factor, min_pixels, max_pixels)


def _resize_within(
    num_frames: int, counted_frames: int, height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Round a size to multiples of `factor`, and scale it if `counted_frames` of that size are outside the bounds."""
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"need 0 < min_pixels <= max_pixels, got {min_pixels}..{max_pixels}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width}x{height}: the aspect ratio is over {MAX_ASPECT_RATIO}; crop the image")
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    # The order of the operations is that of the published processors: another one may round to another multiple.
    if counted_frames * new_height * new_width > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif counted_frames * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def max_pixels_per_frame(
    num_frames: int,
    *,
    total_pixels: int,
    min_pixels: int,
    max_pixels: int = MAX_FRAME_PIXELS,
) -> int:
    """Return the largest number of pixels of a frame within a video's pixel budget.

    It is max(min(max_pixels, total_pixels / num_frames * 2), 1.05 * min_pixels). Two frames share their tokens, so the
    budget limits a video to about total_pixels / 28**2 tokens, whatever its length. A video with so many frames that
    `min_pixels` applies takes more.
    """
    share = total_pixels / num_frames * TEMPORAL_PATCH_SIZE
    return int(max(min(max_pixels, share), int(min_pixels * 1.05)))


def resize_frame(frame: Tensor, height: int, width: int) -> Tensor:
    """Resize with antialiased bicubic interpolation, like torchvision for uint8: integers on the CPU, fp32 on the GPU.

    On photographs, the results of CPU and GPU differ by less than 0.2 of 255 levels on average.

    Args:
        frame: uint8 [old_height, old_width, 3].

    Returns:
        uint8 [height, width, 3] on the same device; `frame` itself if it has that size already.
    """
    if frame.shape[:2] == (height, width):
        return frame
    planes = frame.permute(2, 0, 1).unsqueeze(0)  # channels-last view: torch's fastest path for uint8
    if frame.device.type != "cpu":
        planes = planes.float()
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    if resized.is_floating_point():
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized.squeeze(0).permute(1, 2, 0)
