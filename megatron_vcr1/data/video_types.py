"""Types that the video backends share (result, error, sampling settings, frame table), and the choice of frames."""

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

from megatron_vcr1.data.frame_rules import PER_FRAME_RULES, FrameRules, PixelOptions
from megatron_vcr1.data.resize import TEMPORAL_PATCH_SIZE

VideoPath = str | PathLike[str] | Sequence[str | PathLike[str]]
"""A video file, a folder of images, an fsspec URL, or a list of image files."""

TIME_ROUNDING_S = 1e-6
"""Tolerance for times that containers round: 12 s may be stored as 11.9999999."""
TICKS_PER_S = 10_000
"""Precision of a clip's start and end. The time base of an AVI file is one frame, which is too coarse for them."""

PROGRAMMING_ERRORS = (TypeError, AttributeError, NameError, ImportError, AssertionError)
"""Errors of our code, or of an installed package that does not fit it, but never of a file. They must end the run with
their traceback at the first sample. If they counted as damaged videos, every sample would be skipped."""

OUT_OF_MEMORY = "decoding it needs more memory than there is; make it smaller"
"""Reason of a VideoError for a MemoryError."""


class VideoError(ValueError):
    """Raised for a video or image that cannot be used; the message names the file and the reason."""

    def __init__(self, file: object, reason: str) -> None:
        self.file = str(file)
        self.reason = reason
        super().__init__(self.file, reason)  # unpickling in another process calls VideoError(*args)

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class OptionError(ValueError):
    """Raised for an option of `read_frames` that is out of range."""


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Decoded frames of a video, ready for the model."""

    frames: Tensor
    """uint8 [num_frames, height, width, 3], resized; on the device of the backend that decoded them."""
    timestamps_s: tuple[float, ...]
    """[num_frames] time at which each frame appears, in seconds from the start of the clip; 0 for the frame that is
    already on screen when the clip starts. Frame i of n represents the time from i / n to (i + 1) / n of the clip."""
    duration_s: float
    """Length of the clip: up to the end of its last frame, or up to end_s."""
    backend: str
    """Backend that decoded the video: pyav, dali-cpu, dali-gpu, pillow or images."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Number, time range and size of the frames that are sampled from a video; see `read_frames`."""

    fps: float
    min_frames: int
    max_frames: int
    pixels: PixelOptions
    factor: int
    start_s: float = 0.0
    end_s: float = math.inf
    rules: FrameRules = PER_FRAME_RULES

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise OptionError(f"fps must be above 0, got {self.fps}")
        if not 2 <= self.min_frames <= self.max_frames:
            raise OptionError(f"need 2 <= min_frames <= max_frames, got {self.min_frames}..{self.max_frames}")
        bounds = self.rules.with_defaults(self.pixels)
        least = 1 if bounds.min_pixels is None else bounds.min_pixels
        most = math.inf if bounds.max_pixels is None else bounds.max_pixels
        if not 0 < least <= most:
            raise OptionError(f"need 0 < min_pixels <= max_pixels, got {least}..{most}")
        if bounds.total_pixels is not None and not bounds.total_pixels > 0:
            raise OptionError(f"total_pixels must be above 0, got {bounds.total_pixels}")
        if not 0 <= self.start_s < self.end_s:
            raise OptionError(f"need 0 <= start_s < end_s, got {self.start_s}..{self.end_s}")

    def frame_size(self, num_frames: int, height: int, width: int, file: object) -> tuple[int, int]:
        """Return height and width after resizing, given the height and width of the upright original.

        Raises:
            VideoError: the aspect ratio is too extreme for the model.
        """
        try:
            return self.rules.frame_size(num_frames, height, width, factor=self.factor, options=self.pixels)
        except ValueError as error:
            raise VideoError(file, str(error)) from error


@dataclass(frozen=True)
class FrameTable:
    """Time stamps of all frames of a video, in display order."""

    pts: NDArray[np.int64]
    """[total_frames] presentation time stamps, ascending, in units of time_base."""
    time_base: Fraction
    """Seconds per unit."""
    last_duration: int
    """Time for which the last frame is shown, in units of time_base."""

    def in_ticks(self, ticks_per_s: int) -> FrameTable:
        """Return the same times in a unit of at most 1 / ticks_per_s seconds, so that other times round well to it."""
        factor = math.ceil(self.time_base * ticks_per_s)
        return FrameTable(self.pts * factor, self.time_base / factor, self.last_duration * factor)

    @property
    def duration_s(self) -> float:
        """Time from the appearance of the first frame to the end of the last one."""
        return float((int(self.pts[-1] - self.pts[0]) + self.last_duration) * self.time_base)


@dataclass(frozen=True)
class FrameChoice:
    """The frames to decode."""

    indices: NDArray[np.int64]
    """[num_frames] rows of the frame table, ascending; a frame that stays on screen for a long time may be repeated."""
    timestamps_s: tuple[float, ...]
    """[num_frames] time at which each frame appears, in seconds from the start of the clip."""
    duration_s: float
    """Length of the clip."""


def choose_frames(table: FrameTable, sampling: Sampling, file: object) -> FrameChoice:
    """Choose the frames that are on screen at evenly spaced instants of the clip from start_s to end_s.

    The frame that is on screen when the clip starts is the clip's first frame, at time 0.

    Raises:
        VideoError: the video ends before start_s.
    """
    table = table.in_ticks(TICKS_PER_S)
    times_s = (table.pts - table.pts[0]) * float(table.time_base)
    if sampling.start_s > table.duration_s - TIME_ROUNDING_S:
        clip = f"between {sampling.start_s:g} and {sampling.end_s:g} s"
        raise VideoError(file, f"no frame {clip} in a video of {table.duration_s:.2f} s")
    first = int(np.searchsorted(times_s, sampling.start_s + TIME_ROUNDING_S, side="right")) - 1
    stop = max(int(np.searchsorted(times_s, sampling.end_s - TIME_ROUNDING_S)), first + 1)

    start = round(Fraction(sampling.start_s) / table.time_base)  # in units of time_base, like the next two
    appears = np.maximum(table.pts[first:stop] - table.pts[0] - start, 0)
    duration = int(table.pts[-1] - table.pts[0]) + table.last_duration - start
    if math.isfinite(sampling.end_s):
        duration = min(duration, round(Fraction(sampling.end_s) / table.time_base) - start)
    duration = max(duration, int(appears[-1]) + 1)

    duration_s = float(duration * table.time_base)
    num_frames = num_sampled_frames(duration_s, _max_frames_worth_sampling(table, first, stop), sampling)
    chosen = frames_on_screen(appears, duration, num_frames)
    timestamps_s = tuple((appears[chosen] * table.time_base.numerator / table.time_base.denominator).tolist())
    return FrameChoice(first + chosen, timestamps_s, duration_s)


def num_sampled_frames(duration_s: float, total_frames: float, sampling: Sampling) -> int:
    """Return the number of frames to sample: duration times fps, within the bounds, and rounded down to even.

    The rules of some models round it to a whole number only. The result is at most `total_frames`, except that a video
    of a single frame gives two, so that the vision tower's temporal patch is full.
    """
    multiple = sampling.rules.frame_multiple
    frames = max(duration_s * sampling.fps, sampling.min_frames + -sampling.min_frames % multiple)
    frames = int(min(frames + TIME_ROUNDING_S, sampling.max_frames, total_frames))
    return max(frames - frames % multiple, TEMPORAL_PATCH_SIZE)


def frames_on_screen(appears: NDArray[np.int64], duration: int, num_frames: int) -> NDArray[np.int64]:
    """Return the frame that is on screen at each of `num_frames` instants spread evenly over the whole duration.

    Instant i lies in the i-th of `num_frames` equal parts of the duration, and a frame is never taken before the time
    at which it appears. The first instant is in the middle of the first frame, the last one in the last frame.

    At a constant frame rate the result is round(i * (total_frames - 1) / (num_frames - 1)), as in Qwen's published
    preprocessing. Only an odd `num_frames` has ties, instants at which one frame replaces another; they are rounded as
    NumPy's floating-point numbers are there.

    Args:
        appears: int64 [total_frames], ascending, at least one: time at which each frame replaces the one before it. The
            first one is 0.
        duration: end of the last frame, in the same unit.
        num_frames: number of instants, at least 2.

    Returns:
        int64 [num_frames], indices into `appears`, ascending.
    """
    last = int(appears[-1])
    first_shown_for = int(appears[1]) if len(appears) > 1 else duration
    # The first and the last instant, in units of 1 / (2 * num_frames). A frame that is shown for long has several
    # instants, so these two are at most half a part away from the ends.
    start = min(num_frames * first_shown_for, duration)
    end = max(num_frames * (2 * last + min(duration - last, first_shown_for)), (2 * num_frames - 1) * duration)
    # Time stamps are integers, so the frame on screen at t is the one on screen at floor(t). Python's integers do not
    # overflow where int64 would: nanoseconds times the square of the number of frames.
    denominator = 2 * num_frames * (num_frames - 1)
    exact = [start * (num_frames - 1) + i * (end - start) for i in range(num_frames)]
    instants = np.array([instant // denominator for instant in exact], dtype=np.int64)
    chosen = np.searchsorted(appears, instants, side="right") - 1
    if num_frames % 2:
        is_whole = np.array([instant % denominator == 0 for instant in exact])
        published = np.linspace(0, len(appears) - 1, num_frames).round()
        chosen -= is_whole & (appears[chosen] == instants) & (published == chosen - 1)
    return chosen


def _max_frames_worth_sampling(table: FrameTable, first: int, stop: int) -> float:
    """Return the largest number of frames to sample from the rows first..stop - 1 of a frame table.

    At a constant frame rate this is the number of frames: sampling faster would only repeat them. A video that shows a
    frame at least twice as long as most others (a screen recording, a variable rate) has no such limit, because its
    instants must cover that frame, too.
    """
    shown_for = np.sort(np.diff(table.pts, append=table.pts[-1] + table.last_duration)[first:stop])
    is_constant = shown_for[-1] < 2 * shown_for[(len(shown_for) - 1) // 2]  # the lower median
    return len(shown_for) if is_constant else math.inf


class Deadline:
    """A time limit for decoding one video, checked between packets."""

    def __init__(self, file: object, limit_s: float) -> None:
        self._file = file
        self._limit_s = limit_s
        self._end_s = time.monotonic() + limit_s

    @property
    def remaining_s(self) -> float:
        """Remaining time; always above 0, because some libraries interpret 0 as no limit."""
        return max(self._end_s - time.monotonic(), 1e-3)

    def check(self) -> None:
        """Raise VideoError if the time limit is exceeded."""
        if time.monotonic() > self._end_s:
            raise VideoError(self._file, f"decoding took longer than {self._limit_s:g} s")
