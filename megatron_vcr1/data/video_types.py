"""What the video backends share: the result, the error, the request and a video's table of frames."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vcr1.data.resize import max_pixels_per_frame, smart_resize

VideoPath = str | PathLike[str] | Sequence[str | PathLike[str]]
"""A file, a folder of images, an fsspec URL, or a list of the frames' image files."""

TIME_ROUNDING_S = 1e-6
"""Containers round times; 12 s may be stored as 11.9999999."""


class VideoError(ValueError):
    """A video or picture that must not reach the model: which one, and why."""

    def __init__(self, file: object, reason: str) -> None:
        self.file = str(file)
        self.reason = reason
        super().__init__(self.file, reason)  # both as args, so that the error survives a trip between processes

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """The frames of a video that a model sees."""

    frames: Tensor
    """uint8 [num_frames, height, width, 3], resized; on the device of the backend that made them."""
    timestamps_s: tuple[float, ...]
    """When each frame is shown, counted from the first frame of the video or of its part that was asked for."""
    duration_s: float
    """Length of the video, or of the part: from its first frame's appearance to the end of its last one."""
    backend: str
    """What decoded it: pyav, dali-cpu, dali-gpu or images."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video a model sees, and how large."""

    fps: float
    min_frames: int
    max_frames: int
    total_pixels: int
    min_pixels: int
    max_pixels: int
    factor: int
    start_s: float = 0.0
    end_s: float = math.inf

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if not 2 <= self.min_frames <= self.max_frames:
            raise ValueError(f"need 2 <= min_frames <= max_frames, got {self.min_frames}..{self.max_frames}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {self.min_pixels}..{self.max_pixels}")
        if not self.total_pixels > 0:
            raise ValueError(f"total_pixels must be above 0, got {self.total_pixels}")
        if not 0 <= self.start_s < self.end_s:
            raise ValueError(f"need 0 <= start_s < end_s, got {self.start_s}..{self.end_s}")

    def frame_size(self, num_frames: int, height: int, width: int, file: object) -> tuple[int, int]:
        """Height and width after resizing, for an upright original of height x width.

        Raises:
            VideoError: the picture is too narrow for the model.
        """
        max_pixels = max_pixels_per_frame(
            num_frames, total_pixels=self.total_pixels, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        try:
            return smart_resize(height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=max_pixels)
        except ValueError as error:
            raise VideoError(file, str(error)) from error


@dataclass(frozen=True)
class FrameTable:
    """Every frame of a video in the order of display."""

    pts: NDArray[np.int64]
    """[total_frames] ascending, in units of time_base."""
    time_base: Fraction
    """Seconds a unit."""
    last_duration: int
    """How long the last frame is shown, in units of time_base."""

    @property
    def duration_s(self) -> float:
        """From the first frame's appearance to the end of the last one."""
        return float((int(self.pts[-1] - self.pts[0]) + self.last_duration) * self.time_base)


@dataclass(frozen=True)
class FrameChoice:
    """The frames to decode."""

    indices: NDArray[np.int64]
    """[num_frames] rows of the frame table, ascending; a row may come twice."""
    timestamps_s: tuple[float, ...]
    """When they are shown, counted from the first frame of the part that was asked for."""
    duration_s: float
    """Length of that part."""


def choose_frames(table: FrameTable, sampling: Sampling, file: object) -> FrameChoice:
    """Spread frames evenly over time, from the first to the last one between start_s and end_s.

    Raises:
        VideoError: no frame appears in that time.
    """
    times_s = (table.pts - table.pts[0]) * float(table.time_base)
    first, stop = np.searchsorted(times_s, [sampling.start_s - TIME_ROUNDING_S, sampling.end_s - TIME_ROUNDING_S])
    if first == stop:
        length = f"a video of {table.duration_s:.2f} s"
        raise VideoError(file, f"no frame between {sampling.start_s:g} and {sampling.end_s:g} s in {length}")
    end_s = min(float(times_s[stop]) if stop < len(times_s) else table.duration_s, sampling.end_s)
    duration_s = end_s - float(times_s[first])
    num_frames = num_sampled_frames(duration_s, int(stop - first), sampling)
    indices = first + nearest_frames(table.pts[first:stop], num_frames)
    return FrameChoice(indices, tuple((times_s[indices] - times_s[first]).tolist()), duration_s)


def num_sampled_frames(duration_s: float, total_frames: int, sampling: Sampling) -> int:
    """Frames to decode: duration times rate within the bounds, never more than there are, rounded down to even.

    A video of a single frame gives two, so that the vision tower's temporal patch is full.
    """
    frames = max(duration_s * sampling.fps, sampling.min_frames + sampling.min_frames % 2)
    frames = int(min(frames + TIME_ROUNDING_S, sampling.max_frames, total_frames))
    return max(frames - frames % 2, 2)


def nearest_frames(pts: NDArray[np.int64], num_frames: int) -> NDArray[np.int64]:
    """The frames nearest to `num_frames` instants spread evenly from the first to the last time stamp.

    At a constant rate these are round(i * (total_frames - 1) / (num_frames - 1)), a tie going to the even index. The
    arithmetic is exact: time stamps are integers, and both sides are multiplied by num_frames - 1.

    Args:
        pts: int64 [total_frames], ascending.
        num_frames: at least 2.
    """
    offsets = pts - pts[0]
    targets = np.arange(num_frames, dtype=np.int64) * offsets[-1]
    scaled = offsets * (num_frames - 1)
    later = np.searchsorted(scaled, targets)
    earlier = np.maximum(later - 1, 0)
    gap_earlier, gap_later = targets - scaled[earlier], scaled[later] - targets
    take_earlier = (gap_earlier < gap_later) | ((gap_earlier == gap_later) & (earlier % 2 == 0))
    return np.where(take_earlier, earlier, later)


class Deadline:
    """A time limit on one video, checked between packets."""

    def __init__(self, file: object, limit_s: float) -> None:
        self._file = file
        self._limit_s = limit_s
        self._end_s = time.monotonic() + limit_s

    @property
    def remaining_s(self) -> float:
        """Time left, never 0, which some libraries take for no limit."""
        return max(self._end_s - time.monotonic(), 1e-3)

    def check(self) -> None:
        """Raise VideoError when the time is over."""
        if time.monotonic() > self._end_s:
            raise VideoError(self._file, f"decoding took longer than {self._limit_s:g} s")
