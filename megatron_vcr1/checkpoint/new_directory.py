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

_OTHER_FILES_BYTES = 2**26  # tokenizer, configuration, indices


# Called with the bytes that this worker has just done, and with all those that it has to do.
Progress = Callable[[int, int], object]


def no_progress(num_bytes: int, total_bytes: int) -> None:
    """Shows nothing."""


@contextmanager
def new_directory(path: Path, num_bytes: int) -> Iterator[Path]:
    """A directory that appears under its name complete, or not at all.

    The block, on every worker, fills the directory that it is given. That is beside ``path`` under a temporary name;
    it is renamed when the block has ended without an error, and removed when it has not. What a killed process left for
    the same ``path`` is removed first.

    Args:
        path: the final name; must not exist, or be an empty directory.
        num_bytes: of weights that the block will write; checked against the free space.

    Raises:
        UserError: ``path`` holds something, its parent does not exist, or the disk lacks the space.
    """
    path = path.resolve()  # where a link points to
    with ExitStack() as lock:
        partial = run_on_first_rank(lambda: _make_partial(path, num_bytes, lock))
        try:
            yield partial
            run_on_first_rank(lambda: publish(partial, path))
        finally:
            if mesh.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # gone when it was published


def _make_partial(path: Path, num_bytes: int, lock: ExitStack) -> Path:
    """A temporary directory beside ``path``, locked until ``lock`` is closed, or this process ends in any way."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory; create it first")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        _remove_if_dead(leftover)
    needed, free = num_bytes + _OTHER_FILES_BYTES, shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(f"{path.parent}: disk full: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    if path.exists():
        try:
            path.rmdir()  # now: at the end it may turn out to be a mount point, whose name cannot be taken
        except OSError as error:
            raise UserError(f"{path}: exists ({error.strerror}); name a new directory, or remove it first") from None
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    lock.enter_context(_locked(partial))
    return partial


def _remove_if_dead(partial: Path) -> None:
    with _locked(partial) as is_ours:
        if is_ours:
            logger.info("%s: removed, a process was killed while it was at it", partial)
            shutil.rmtree(partial)
        else:
            logger.warning(
                "%s: being written by another process, or left by one that was killed, which this file system does not "
                "tell; remove it in the latter case",
                partial,
            )


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether this process holds a directory's lock in the with-block: no other one does, and there are locks here."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # taken; or, as on NFS, a directory has none
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
