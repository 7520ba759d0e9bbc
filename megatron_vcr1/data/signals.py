"""Child processes that leave a run's signals to the run.

A job scheduler sends SIGTERM and SIGUSR1 to every process of a job. The training process saves on them, and until it
has, its children have to go on working; they end when it does.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

_OF_THE_RUN = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def children_without_signals() -> Iterator[None]:
    """Processes started within the with-block, and theirs, do not hear those signals; this one hears them behind it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server() -> None:
    """Start multiprocessing's fork server so that what it forks does not hear those signals either."""
    with children_without_signals():
        resource_tracker.ensure_running()
    with children_without_signals():  # again: the line above unblocks SIGTERM
        forkserver.ensure_running()
