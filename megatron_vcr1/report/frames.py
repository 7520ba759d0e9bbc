"""Reads a few frames of a video as small JPEG images for the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_vcr1.data.templates import video_arguments
from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.types import VideoSample

MAX_FRAMES = 8
"""Maximum number of frames of a sample. For tracking, they are frames that the model sees."""

TIME_LIMIT_S = 20.0
_MIN_PIXELS, _MAX_PIXELS = 112 * 112, 176 * 176
_JPEG_QUALITY = 72


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as a JPEG data URI; `index` is its position among the frames that were read."""

    index: int
    time_s: float
    width: int
    height: int
    uri: str


@dataclass(frozen=True, slots=True)
class FilmStrip:
    """Evenly spaced frames of the sample's clip, which lasts duration_s."""

    frames: tuple[Frame, ...]
    duration_s: float


def read_strip(sample: VideoSample, reader: VideoReader) -> FilmStrip:
    """Read up to MAX_FRAMES frames of the sample.

    Raises:
        VideoError: the video is missing or damaged.
    """
    limits = {"min_frames": MAX_FRAMES, "max_frames": MAX_FRAMES, "min_pixels": _MIN_PIXELS, "max_pixels": _MAX_PIXELS}
    options = video_arguments(sample, limits)
    path = options.pop("video")
    video = reader.read_frames(path, num_threads=1, time_limit_s=TIME_LIMIT_S, **options)
    # A list of images is read as a whole, whatever the limit.
    picked = np.unique(np.linspace(0, len(video.frames) - 1, min(len(video.frames), MAX_FRAMES)).round().astype(int))
    frames = tuple(_frame(index, video.timestamps_s[index], video.frames[index].numpy()) for index in picked.tolist())
    return FilmStrip(frames, video.duration_s)


def _frame(index: int, time_s: float, pixels: np.ndarray) -> Frame:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Frame(index, time_s, pixels.shape[1], pixels.shape[0], uri)
