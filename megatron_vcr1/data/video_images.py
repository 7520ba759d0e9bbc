"""Videos that are stored as images: a folder, or a list of files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.resize import TEMPORAL_PATCH_SIZE, resize_frame
from megatron_vcr1.data.video_types import (
    Deadline,
    FrameChoice,
    FrameTable,
    Sampling,
    VideoError,
    VideoFrames,
    choose_frames,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def images_in_folder(folder: Path) -> list[str]:
    """List a folder's images in natural order of their names: frame_2.jpg comes before frame_10.jpg.

    Hidden files are ignored.

    Raises:
        VideoError: the folder contains no image.
    """
    if not (files := list_images(folder)):
        raise VideoError(folder, f"the folder contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def list_images(folder: Path) -> list[str]:
    """List a folder's images like `images_in_folder`; an empty list if there are none."""
    # Hidden files are not frames: macOS writes a file ._0.jpg with metadata beside 0.jpg on foreign file systems.
    files = [
        file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    ]
    return [os.fspath(file) for file in sorted(files, key=_natural_order)]


def decode_images(
    files: Sequence[str], sampling: Sampling, image_fps: float, *, sample: bool, deadline: Deadline
) -> VideoFrames:
    """Read images as the frames of a video.

    Args:
        files: image files in display order.
        sampling: number and size of the frames.
        image_fps: images per second.
        sample: whether to sample frames at sampling.fps. Otherwise all images are used, the last one twice if their
            number must be even.
        deadline: time limit, checked before each image.

    Raises:
        VideoError: the list is empty, an image is damaged, or the images differ in size.
    """
    if not files:
        raise VideoError(files, "the list of frames is empty")
    choice = _sampled(files, sampling, image_fps) if sample else _all(files, image_fps, sampling.rules.frame_multiple)
    first = read_image(files[choice.indices[0]])
    height, width = sampling.frame_size(len(choice.indices), first.shape[0], first.shape[1], files[choice.indices[0]])
    frames = torch.empty(len(choice.indices), height, width, 3, dtype=torch.uint8)
    for row, index in enumerate(choice.indices):
        deadline.check()
        image = read_image(files[index]) if row else first
        if image.shape != first.shape:
            sizes = f"{image.shape[1]}x{image.shape[0]}", f"{first.shape[1]}x{first.shape[0]}"
            raise VideoError(files[index], f"its size is {sizes[0]}, but the video's first frame is {sizes[1]}")
        frames[row] = resize_frame(image, height, width)
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, "images")


def _sampled(files: Sequence[str], sampling: Sampling, image_fps: float) -> FrameChoice:
    """Choose images at sampling.fps, as from a video with a constant frame rate."""
    table = FrameTable(pts=np.arange(len(files), dtype=np.int64), time_base=1 / Fraction(image_fps), last_duration=1)
    return choose_frames(table, sampling, Path(files[0]).parent)


def _all(files: Sequence[str], image_fps: float, multiple: int) -> FrameChoice:
    """Choose every image once, and repeat the last one up to a multiple, and a single one to fill a temporal patch."""
    num_frames = max(len(files) + -len(files) % multiple, TEMPORAL_PATCH_SIZE)
    indices = np.arange(num_frames).clip(max=len(files) - 1)
    return FrameChoice(indices, tuple((indices / image_fps).tolist()), len(indices) / image_fps)


def _natural_order(file: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key that compares runs of digits as numbers; 01.jpg and 1.jpg are in the order of their texts."""
    pieces = re.split(r"(\d+)", file.name)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece], file.name
