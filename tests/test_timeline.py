"""Timeline spans of threads and worker processes, and the recordings that collect them."""

from __future__ import annotations

import threading

from megatron_vcr1 import timeline
from megatron_vcr1.timeline import Span


def test_spans_are_named_after_their_thread_and_open_spans_end_with_the_recording() -> None:
    started, may_end = threading.Event(), threading.Event()

    def sample() -> None:
        with timeline.span("rollout"):
            started.set()
            may_end.wait()

    thread = threading.Thread(target=sample, name="rollout_0")
    with timeline.recording() as spans:
        thread.start()
        started.wait()
        with timeline.span("update"):
            pass
    may_end.set()
    thread.join()
    update, rollout = spans
    assert (update.name, update.track) == ("update", "MainThread")
    assert (rollout.name, rollout.track) == ("rollout", "rollout_0")
    assert rollout.start_ns <= update.start_ns <= update.end_ns <= rollout.end_ns


def test_spans_outside_a_recording_are_dropped() -> None:
    with timeline.span("update"):
        pass
    timeline.add(Span("decode", "worker 0", 1, 2))
    with timeline.recording() as spans:
        pass
    assert spans == []


def test_every_active_recording_receives_a_workers_span() -> None:
    decode = Span("decode", "worker 0", 1, 2)
    with timeline.recording() as outer, timeline.recording() as inner:
        timeline.add(decode)
    assert outer == inner == [decode]


def test_current_is_the_innermost_open_span_of_a_thread() -> None:
    assert timeline.current() is None
    with timeline.span("total"):
        with timeline.span("rollout"):
            assert timeline.current() == "rollout"
        assert timeline.current() == "total" and timeline.current("another thread") is None
