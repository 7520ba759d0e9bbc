"""The lock of a run's checkpoint directory: only one job may train there at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import time
from pathlib import Path
from typing import IO

from megatron_vcr1.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# How long to wait for the lock. A file server may keep the lock of a process for a while after its node has died.
LOCK_TIMEOUT_S = 120.0
_POLL_S = 1.0


def lock_run(directory: Path) -> IO[str]:
    """Lock a run's checkpoint directory. Only rank 0 calls this.

    The lock is a POSIX record lock (lockf), which also works on NFS. The kernel releases it when the process ends,
    however it ends, or when the returned file is closed. A job that Slurm restarts may start before the lock of its
    predecessor has been released, so this function waits for a lock that another process holds.

    Returns:
        The open lock file. Keep it open for as long as the lock is needed, and do not open the file again in this
        process: closing any descriptor of a file releases all record locks that the process has on it.

    Raises:
        UserError: another process still holds the lock after `LOCK_TIMEOUT_S`.
    """
    file = (directory / LOCK_FILE).open("w")
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    has_warned = False
    while not _try_lock(file, directory):
        if time.monotonic() >= deadline:
            file.close()
            raise UserError(f"{directory}: another process is training here; end it, or choose another train.run_dir")
        if not has_warned:
            has_warned = True
            logger.warning(
                "%s: another process holds this directory's lock; waiting up to %.0f s for it to end (it may have "
                "ended already, on a node that died)",
                directory,
                LOCK_TIMEOUT_S,
            )
        time.sleep(_POLL_S)
    return file


def _try_lock(file: IO[str], directory: Path) -> bool:
    """Try to get the lock. Return True too if the file system has no locks, after a warning."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning(
            "%s: this file system does not support locks (%s); make sure that no second run uses this directory",
            directory,
            error,
        )
    return True
