"""A task that runs in a background thread, one at a time, and whose error is raised in the thread that waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundTask:
    """At most one running task. All methods are called from the same thread (the one that trains).

    The thread is a daemon: if the main thread ends with an error, the process exits without waiting for the task. That
    is safe for a checkpoint, which gets its final name only in the last step of its task.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        # Written by the background thread, once, before it ends. Read by the main thread: after `join` by `finish`,
        # and at any time by `has_failed`, where a stale value does no harm.
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None], name: str) -> None:
        """Start a task in a new thread. Call `finish` for the previous task first.

        Args:
            work: the task.
            name: name of the thread, which stack traces show.
        """
        assert self._thread is None, "call finish() before starting another task"

        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised in the thread that waits for the task
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the task to end, and raise its error if it has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def has_failed(self) -> bool:
        """True if the task has failed with an error that `finish` has not raised yet."""
        return self._error is not None
