"""Cache of decoded videos, so that a small data set is not decoded again for every epoch and every question."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from megatron_vcr1.data.video import VideoFrames, VideoPath, read_frames


class VideoCache:
    """A least-recently-used cache around `read_frames`, bounded by the number of bytes of its frames.

    It belongs to one thread of one process; there is no lock.
    """

    def __init__(self, max_bytes: int, read: Callable[..., VideoFrames] = read_frames) -> None:
        """Create an empty cache.

        Args:
            max_bytes: total size of the cached frames; 0 disables the cache.
            read: function that reads a video which is not in the cache.
        """
        self._max_bytes = max_bytes
        self._read = read
        self._num_bytes = 0
        self._videos: OrderedDict[Hashable, VideoFrames] = OrderedDict()  # the most recently used video is last

    def read_frames(self, path: VideoPath, **options: Any) -> VideoFrames:
        """Return `read(path, **options)`. Callers share the frames and must not modify them."""
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
    """Return a value that changes when a local file is rewritten; None for anything that is not a local file."""
    if isinstance(path, str | os.PathLike):
        with suppress(OSError):
            status = os.stat(path)
            return status.st_mtime_ns, status.st_size
        return None
    return tuple(map(_version, path))
