"""Durations of videos, for annotations that do not state them."""

from __future__ import annotations

import os
from collections.abc import Callable

from megatron_vcr1.data.video import VideoFrames

_FEW_FRAMES = {"fps": 0.1, "min_frames": 2, "max_frames": 2, "total_pixels": 28 * 28, "min_pixels": 28 * 28}


class DurationProbe:
    """Measures videos with the reader of the training, so that both agree on where a video ends.

    Each video is opened once. Only two of its frames are decoded, but all of its packets are checked.

    Args:
        read_frames: a function like `megatron_vcr1.data.video.read_frames`.
    """

    def __init__(self, read_frames: Callable[..., VideoFrames]) -> None:
        self._read_frames = read_frames
        self._known: dict[tuple[str, float | None], float] = {}

    def duration_s(self, video: str, image_fps: float | None) -> float | None:
        """Return the duration of a video in seconds; None for a folder of images without a frame rate.

        Raises:
            VideoError: the video cannot be read.
        """
        if image_fps is None and os.path.isdir(video):
            return None
        key = (video, image_fps)
        if key not in self._known:
            options = _FEW_FRAMES if image_fps is None else {**_FEW_FRAMES, "image_fps": image_fps}
            self._known[key] = round(self._read_frames(video, **options).duration_s, 3)
        return self._known[key]
