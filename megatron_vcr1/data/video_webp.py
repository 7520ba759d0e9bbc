"""Animated WebP images as videos. FFmpeg before version 9 decodes WebP images, but not their animations."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from PIL import Image

from megatron_vcr1.data.images import MAX_IMAGE_PIXELS, blend_onto_white
from megatron_vcr1.data.media_files import open_media
from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.video_types import Deadline, FrameTable, Sampling, VideoError, VideoFrames, choose_frames

FFMPEG_FORMATS = ("webp_pipe", "webp_anim")
"""The second is the format of animations in FFmpeg 9."""
DEFAULT_DURATION_MS = 100
"""Time for which browsers show a frame whose duration is 0."""


def decode_webp(file: str, sampling: Sampling, *, deadline: Deadline) -> VideoFrames:
    """Decode the sampled frames of a WebP image; one that is not animated is a video of one frame.

    Args:
        file: local path or fsspec URL.
        sampling: number, time range and size of the frames.
        deadline: time limit, checked before each frame.

    Raises:
        VideoError: the image is damaged or too large.
    """
    # Decoded twice: first to learn the frames' durations, because a frame is chosen by the time at which it is shown.
    durations_ms = [int(image.info.get("duration") or DEFAULT_DURATION_MS) for image in _decode_all(file, deadline)]
    ends_ms = np.cumsum(durations_ms, dtype=np.int64)
    table = FrameTable(ends_ms - durations_ms, Fraction(1, 1000), last_duration=durations_ms[-1])
    choice = choose_frames(table, sampling, file)
    frames = None
    for number, image in enumerate(_decode_all(file, deadline)):
        rows = np.flatnonzero(choice.indices == number)
        if not len(rows):
            continue
        height, width = sampling.frame_size(len(choice.indices), image.height, image.width, file)
        if frames is None:
            frames = torch.empty(len(choice.indices), height, width, 3, dtype=torch.uint8)
        rgb = np.array(blend_onto_white(image.convert("RGBA")))
        frames[rows.tolist()] = resize_frame(torch.from_numpy(rgb), height, width)
    assert frames is not None
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, "pillow")


def _decode_all(file: str, deadline: Deadline) -> Iterator[Image.Image]:
    """Yield the image once for each of its frames, at that frame."""
    try:
        with open_media(file) as stream, Image.open(stream, formats=("WEBP",)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise VideoError(file, f"{image.width}x{image.height} frames are too large; scale it down")
            for number in range(getattr(image, "n_frames", 1)):
                deadline.check()
                image.seek(number)
                image.load()
                yield image
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # what Pillow raises for damage
        raise VideoError(file, f"damaged image ({error})") from error
