"""Decoding processes: a decoder that crashes, hangs or fills the memory costs one request, not the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import LifoQueue
from typing import Any

from torch import Tensor

from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.data.video_types import VideoError, VideoFrames

MAX_MEMORY_BYTES = 4 << 30
"""Memory that decoding one video or image may use. H.264 at 8192 x 4352 keeps up to 17 frames of 53 MB per thread."""

TIME_LIMIT_S = 60.0
"""Time limit for one video or image."""

REQUEST_TIME_LIMIT_S = 300.0
"""Time limit for all videos and images of a request together. It keeps a few requests from using all processes."""

THREADS_PER_DECODER = 2


class Decoders:
    """A fixed number of decoding processes, which start when they are first needed."""

    def __init__(self, num_processes: int) -> None:
        # Last in, first out: few clients at a time need few processes.
        self._idle: LifoQueue[VideoReader] = LifoQueue()
        self._readers = [VideoReader(MAX_MEMORY_BYTES) for _ in range(num_processes)]
        for reader in self._readers:
            self._idle.put(reader)

    @contextmanager
    def borrow(self) -> Iterator[dict[str, Any]]:
        """Provide the arguments `read` and `read_image` of `encode_messages`; wait for a process that is free."""
        reader = self._idle.get()
        deadline = time.monotonic() + REQUEST_TIME_LIMIT_S

        def time_limit_s(file: str) -> float:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise VideoError(
                    file, f"decoding the request's images and videos takes more than {REQUEST_TIME_LIMIT_S:.0f} s"
                )
            return min(TIME_LIMIT_S, remaining_s)

        def read(video: str | list[str], **options: Any) -> VideoFrames:
            limit_s = time_limit_s(video[0] if isinstance(video, list) else video)
            return reader.read_frames(video, num_threads=THREADS_PER_DECODER, time_limit_s=limit_s, **options)

        def read_image(image: str) -> Tensor:
            return reader.read_image(image, time_limit_s=time_limit_s(image))

        try:
            yield {"read": read, "read_image": read_image}
        finally:
            self._idle.put(reader)

    def close(self) -> None:
        """End the processes; call it when none is borrowed."""
        for reader in self._readers:
            reader.close()
