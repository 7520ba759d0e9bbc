"""A directory that several ranks fill and that appears under its final name only when it is complete."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_vcr1.checkpoint.disk import publish
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank

logger = logging.getLogger(__name__)

OTHER_FILES_BYTES = 2**26  # upper bound for the files besides the weights: tokenizer, configuration, indices

# A callback for progress: called with the bytes that this rank has just converted, and with its total.
Progress = Callable[[int, int], object]


def no_progress(num_bytes: int, total_bytes: int) -> None:
    """Ignore progress."""


@contextmanager
def new_directory(path: Path, num_bytes: int) -> Iterator[Path]:
    """Create a directory that appears under its final name when it is complete, or not at all.

    All ranks enter and leave the with-block together. They fill the directory that they are given, which has a
    temporary name beside ``path``. If the block ends without an error on all ranks, rank 0 publishes it under its final
    name; otherwise rank 0 removes it. Temporary directories of processes that were killed are removed at the start; a
    lock on each of them tells whether its process still runs.

    Args:
        path: the final name; must not exist, or be an empty directory.
        num_bytes: size of the weights that the block will write; checked against the free disk space.

    Raises:
        UserError: ``path`` is not empty, its parent does not exist, or the disk is too small.
    """
    path = path.resolve()  # follow symbolic links, so that a link stays a link
    with ExitStack() as lock:
        partial = run_on_first_rank(lambda: _create_partial(path, num_bytes, lock))
        try:
            yield partial
            run_on_first_rank(lambda: publish(partial, path))
        finally:
            if mesh.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # no longer exists if it was published


def _create_partial(path: Path, num_bytes: int, lock: ExitStack) -> Path:
    """Create a temporary directory beside ``path``, and lock it until ``lock`` is closed or this process ends."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; create it first")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        _remove_if_abandoned(leftover)
    needed, free = num_bytes + OTHER_FILES_BYTES, shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(f"{path.parent}: disk full: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    if path.exists():
        # Remove an empty directory now rather than at the end. A mount point cannot be removed or renamed over; found
        # out at the end, that would lose all the work.
        try:
            path.rmdir()
        except OSError as error:
            raise UserError(
                f"{path}: exists ({error.strerror}); give the path of a new directory, or remove this one first"
            ) from None
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    lock.enter_context(_try_lock(partial))
    return partial


def _remove_if_abandoned(partial: Path) -> None:
    """Remove a temporary directory whose process has ended."""
    with _try_lock(partial) as is_locked:
        if is_locked:
            logger.info("%s: removed; the process that wrote it was killed", partial)
            shutil.rmtree(partial)
        else:
            logger.warning(
                "%s: not removed. Either another process is writing it, or the process that wrote it was killed and "
                "this file system has no locks on directories; in the latter case remove it",
                partial,
            )


@contextmanager
def _try_lock(directory: Path) -> Iterator[bool]:
    """Try to lock a directory for the duration of the with-block, and tell whether that succeeded.

    The kernel releases the lock when the process ends, however it ends.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by another process, or not supported for directories (NFS)
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
