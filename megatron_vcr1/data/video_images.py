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
from megatron_vcr1.data.resize import resize_frame
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
    """A folder's images in the order of their names, numbers by value: frame_2.jpg comes before frame_10.jpg.

    Raises:
        VideoError: there is none.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise VideoError(folder, f"a folder without images ({', '.join(IMAGE_SUFFIXES)})")
    return [os.fspath(file) for file in sorted(files, key=_natural_order)]


def decode_images(
    files: Sequence[str], sampling: Sampling, image_fps: float, *, sample: bool, deadline: Deadline
) -> VideoFrames:
    """Read images as the frames of a video.

    Args:
        files: image files in the order of display.
        sampling: how many frames, and how large.
        image_fps: images a second.
        sample: choose frames at sampling.fps; otherwise all are used, the last one twice if their number is odd.
        deadline: when to give up.

    Raises:
        VideoError: there are no images, one is damaged, or their sizes differ.
    """
    if not files:
        raise VideoError(files, "a list without frames")
    choice = _sampled(files, sampling, image_fps) if sample else _all(files, image_fps)
    first = read_image(files[choice.indices[0]])
    height, width = sampling.frame_size(len(choice.indices), first.shape[0], first.shape[1], files[choice.indices[0]])
    frames = torch.empty(len(choice.indices), height, width, 3, dtype=torch.uint8)
    for row, index in enumerate(choice.indices):
        deadline.check()
        image = read_image(files[index]) if row else first
        if image.shape != first.shape:
            raise VideoError(files[index], f"{image.shape[1]}x{image.shape[0]} in a video of other size")
        frames[row] = resize_frame(image, height, width)
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, "images")


def _sampled(files: Sequence[str], sampling: Sampling, image_fps: float) -> FrameChoice:
    table = FrameTable(pts=np.arange(len(files), dtype=np.int64), time_base=1 / Fraction(image_fps), last_duration=1)
    return choose_frames(table, sampling, Path(files[0]).parent)


def _all(files: Sequence[str], image_fps: float) -> FrameChoice:
    """Every image once; the last one twice if their number is odd, so that the temporal patch is full."""
    indices = np.arange(len(files) + len(files) % 2).clip(max=len(files) - 1)
    return FrameChoice(indices, tuple((indices / image_fps).tolist()), len(indices) / image_fps)


def _natural_order(file: Path) -> list[tuple[int, int, str]]:
    """Sort key in which digits count as numbers."""
    pieces = re.split(r"(\d+)", file.name)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]
