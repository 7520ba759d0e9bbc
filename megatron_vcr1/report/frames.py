"""Reads images and a few frames of videos as small JPEG images for the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import PIL.Image
from torch import Tensor

from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.templates import video_arguments
from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.tasks import task_of
from megatron_vcr1.types import Medium, Sample, Video

MAX_FRAMES = 8
"""Maximum number of frames of a sample. For tracking, they are frames that the model sees."""

TIME_LIMIT_S = 20.0
_MIN_PIXELS, _MAX_PIXELS = 112 * 112, 176 * 176
_JPEG_QUALITY = 72


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame or an image as a JPEG data URI.

    Attributes:
        index: position among the frames that were read.
        time_s: time of the frame; None for an image.
    """

    index: int
    time_s: float | None
    width: int
    height: int
    uri: str


@dataclass(frozen=True, slots=True)
class FilmStrip:
    """Evenly spaced frames of a video or clip, which lasts duration_s; or an image, which has no duration."""

    frames: tuple[Frame, ...]
    duration_s: float | None


def read_strip(sample: Sample, medium: Medium, reader: VideoReader) -> FilmStrip:
    """Read up to MAX_FRAMES frames of one of a sample's videos, or one of its images.

    Raises:
        VideoError: the file is missing or damaged.
    """
    if not isinstance(medium, Video):
        return FilmStrip((_frame(0, None, _thumbnail(read_image(medium.path)).numpy()),), None)
    limits = {"min_frames": MAX_FRAMES, "max_frames": MAX_FRAMES, "min_pixels": _MIN_PIXELS, "max_pixels": _MAX_PIXELS}
    options = video_arguments(medium, {**limits, **task_of(sample).video_options(sample)})
    path = options.pop("video")
    video = reader.read_frames(path, num_threads=1, time_limit_s=TIME_LIMIT_S, **options)
    # A list of images is read as a whole, whatever the limit.
    picked = np.unique(np.linspace(0, len(video.frames) - 1, min(len(video.frames), MAX_FRAMES)).round().astype(int))
    frames = tuple(_frame(index, video.timestamps_s[index], video.frames[index].numpy()) for index in picked.tolist())
    return FilmStrip(frames, video.duration_s)


def _thumbnail(image: Tensor) -> Tensor:
    """Resize an image, uint8 [height, width, 3], to about the size of the frames, whatever its aspect ratio."""
    height, width, _ = image.shape
    scale = min(1.0, (_MAX_PIXELS / (height * width)) ** 0.5)
    return resize_frame(image, max(int(height * scale), 1), max(int(width * scale), 1))


def _frame(index: int, time_s: float | None, pixels: np.ndarray) -> Frame:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Frame(index, time_s, pixels.shape[1], pixels.shape[0], uri)
