"""Decoded videos kept in memory: a small data set is decoded once, not once an epoch or once a question."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from megatron_vcr1.data.video import VideoFrames, VideoPath, read_frames


class VideoCache:
    """`read_frames` that remembers the videos that were read last, up to a number of bytes."""

    def __init__(self, max_bytes: int, read: Callable[..., VideoFrames] = read_frames) -> None:
        self._max_bytes = max_bytes
        self._read = read
        self._num_bytes = 0
        self._videos: OrderedDict[Hashable, VideoFrames] = OrderedDict()  # the one used last is at the end

    def read_frames(self, path: VideoPath, **options: Any) -> VideoFrames:
        """`read(path, **options)`; the frames are shared, so nobody may change them."""
        key = (repr(path), _version(path), tuple(sorted(options.items())))
        if key in self._videos:
            self._videos.move_to_end(key)
            return self._videos[key]
        video = self._read(path, **options)
        if (size := video.frames.nbytes) <= self._max_bytes:
            self._videos[key] = video
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                _, oldest = self._videos.popitem(last=False)
                self._num_bytes -= oldest.frames.nbytes
        return video


def _version(path: VideoPath) -> Hashable:
    """Changes when a file is written anew; for what is no file here it says nothing."""
    if isinstance(path, str | os.PathLike):
        with suppress(OSError):
            status = os.stat(path)
            return status.st_mtime_ns, status.st_size
        return None
    return tuple(map(_version, path))
