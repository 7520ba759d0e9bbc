from __future__ import annotations

import threading

import pytest

from megatron_vcr1.checkpoint.background_task import BackgroundTask
from tests.limits import HANG_S


def test_finish_waits_for_the_task() -> None:
    task, release, done = BackgroundTask(), threading.Event(), []
    task.start(lambda: done.append(release.wait(HANG_S)), "test")
    assert not done
    release.set()
    task.finish()
    assert done == [True]
    task.finish()  # without a task there is nothing to wait for


def test_the_error_is_raised_once_by_finish() -> None:
    def fail() -> None:
        raise OSError("disk full")

    task = BackgroundTask()
    task.start(fail, "test")
    with pytest.raises(OSError, match="disk full"):
        task.finish()
    assert not task.has_failed
    task.finish()
    task.start(lambda: None, "another task")
    task.finish()


def test_a_failure_is_visible_before_finish() -> None:
    def fail() -> None:
        raise OSError("disk full")

    task = BackgroundTask()
    task.start(fail, "test that fails")
    for thread in threading.enumerate():
        if thread.name == "test that fails":
            thread.join()
    assert task.has_failed
