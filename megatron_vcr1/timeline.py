"""When this process, its threads and its workers did what: spans of time, kept only while somebody records them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import record_function


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        track: who did it: the name of a thread, or of a worker process.
        start_ns, end_ns: since the epoch, as torch's profiler counts.
    """

    name: str
    track: str
    start_ns: int
    end_ns: int


_recordings: list[list[Span]] = []
_under_way: dict[object, tuple[str, str, int]] = {}  # name, track, start_ns


@contextmanager
def recording() -> Iterator[list[Span]]:
    """A list that spans are added to as they end within the with-block; those under way at its end are cut there."""
    spans: list[Span] = []
    _recordings.append(spans)
    try:
        yield spans
    finally:
        _recordings.remove(spans)
        spans += [Span(*started, time.time_ns()) for started in list(_under_way.values())]


def add(span: Span) -> None:
    """Take over a span, for example of a worker process; nothing is kept where nobody records."""
    for spans in _recordings:
        spans.append(span)


@contextmanager
def span(name: str) -> Iterator[None]:
    """The with-block as a span of this thread, and as a range of torch's profiler."""
    key = object()
    _under_way[key] = started = (name, threading.current_thread().name, time.time_ns())
    try:
        with record_function(name):
            yield
    finally:
        del _under_way[key]
        add(Span(*started, time.time_ns()))
