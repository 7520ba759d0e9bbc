"""Time spans of this process, its threads and its worker processes, kept only while a recording is active."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import record_function


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work that took time.

    Attributes:
        name: what was done.
        track: who did it: the name of a thread, or of a worker process.
        start_ns: start, in nanoseconds since the epoch, the clock of torch's profiler.
        end_ns: end, on the same clock.
    """

    name: str
    track: str
    start_ns: int
    end_ns: int


# Threads read and change both without a lock: each operation on them is atomic under the GIL.
_recordings: list[list[Span]] = []
_open_spans: dict[object, tuple[str, str, int]] = {}  # key of each `span` block to its name, track and start_ns


@contextmanager
def recording() -> Iterator[list[Span]]:
    """Collect the spans that end within the with-block, of all threads; spans still open at its end are cut there."""
    spans: list[Span] = []
    _recordings.append(spans)
    try:
        yield spans
    finally:
        _recordings.remove(spans)
        spans += [Span(*started, time.time_ns()) for started in list(_open_spans.values())]


def add(span: Span) -> None:
    """Add a finished span, for example one that a worker process reported, to all active recordings."""
    for spans in _recordings:
        spans.append(span)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Record the with-block as a span of this thread, and as a range of torch's profiler."""
    key = object()
    _open_spans[key] = started = (name, threading.current_thread().name, time.time_ns())
    try:
        with record_function(name):
            yield
    finally:
        del _open_spans[key]
        add(Span(*started, time.time_ns()))


def current(track: str = "MainThread") -> str | None:
    """Return the name of the innermost span of a thread that is open now; None if there is none."""
    return next((name for name, owner, _ in reversed(list(_open_spans.values())) if owner == track), None)
