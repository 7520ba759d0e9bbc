"""Decoding processes: a decoder that crashes, hangs or fills the memory costs one request, not the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from queue import LifoQueue
from typing import Any

from megatron_vcr1.data.video_process import VideoReader

MAX_MEMORY_BYTES = 4 << 30
"""Memory that decoding one video or image may use. H.264 at 8192 x 4352 keeps up to 17 frames of 53 MB per thread."""

TIME_LIMIT_S = 60.0
"""Time limit for one video or image."""

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
        try:
            yield {
                "read": partial(reader.read_frames, num_threads=THREADS_PER_DECODER, time_limit_s=TIME_LIMIT_S),
                "read_image": partial(reader.read_image, time_limit_s=TIME_LIMIT_S),
            }
        finally:
            self._idle.put(reader)

    def close(self) -> None:
        """End the processes; call it when none is borrowed."""
        for reader in self._readers:
            reader.close()
