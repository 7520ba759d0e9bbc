"""Child processes that do not react to the job scheduler's signals.

A job scheduler sends SIGTERM and SIGUSR1 to every process of a job. The training process saves a checkpoint when it
receives them. Until it has done so, its child processes must keep working; they end when the training process ends.

A signal mask is inherited by child processes and survives exec, whereas a signal handler does not. Therefore the
signals are blocked in the parent while a child starts, and unblocked in the parent afterwards.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

_JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PRELOADED = ["__main__", "megatron_vcr1.data.loader"]
"""Modules that the fork server imports, so that its workers start at once and share their memory."""


@contextmanager
def block_job_signals_in_children() -> Iterator[None]:
    """Block the job's signals in all processes that are started within the with-block, and in their children.

    A signal that this thread receives meanwhile is delivered at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server() -> None:
    """Start multiprocessing's fork server with the job's signals blocked; the processes that it forks inherit the mask.

    Does nothing if the fork server is already running.
    """
    with block_job_signals_in_children():
        resource_tracker.ensure_running()
    # A with-block of its own: starting the resource tracker unblocks SIGTERM in this thread.
    forkserver.set_forkserver_preload(PRELOADED)
    with block_job_signals_in_children():
        forkserver.ensure_running()
