"""The directories of a run's checkpoints: their names, and atomic creation, replacement and removal.

    step_N                    a complete checkpoint; nothing else ever has this name
    step_N.damaged            a checkpoint that failed its integrity check
    .step_N.partial-XXXX      a checkpoint that is being written
    .step_N.removed-XXXX      a checkpoint that is being removed

A directory becomes step_N, and stops being it, by a single rename. So a crash at any instant leaves either a complete
checkpoint under that name or none. A run that has just locked the directory removes all directories whose names start
with a dot: they can only be leftovers of earlier runs.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vcr1.checkpoint.disk import publish, sync_directory
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR
from megatron_vcr1.checkpoint.new_directory import OTHER_FILES_BYTES

logger = logging.getLogger(__name__)


def saved_steps(directory: Path) -> list[int]:
    """Return the steps that have a checkpoint in a run's checkpoint directory, in ascending order."""
    matches = (re.fullmatch(r"step_(\d+)", path.name) for path in directory.glob("step_*") if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def step_dir(directory: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return directory / f"step_{step}"


def create_partial(directory: Path, step: int, num_bytes: int) -> Path:
    """Create the hidden directory in which a checkpoint is written.

    Its name is random, so that a rank that is left over from a dead run, and still writes, cannot write into it.

    Args:
        directory: the run's checkpoint directory.
        step: step of the checkpoint.
        num_bytes: size of its tensors; checked against the free disk space.

    Raises:
        OSError: the disk is full (ENOSPC) or failed.
    """
    needed, free = num_bytes + OTHER_FILES_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", str(directory))
    partial = directory / f".step_{step}.partial-{secrets.token_hex(4)}"
    (partial / MEGATRON_DIR).mkdir(parents=True)
    return partial


def replace_directory(source: Path, target: Path) -> None:
    """Rename a complete directory, durably; a directory that has the target's name is removed first."""
    if target.exists():
        remove_directory(target)
    publish(source, target)


def remove_directory(path: Path) -> None:
    """Remove a checkpoint: hide it with a durable rename first, so that it is never seen without some of its files.

    Raises:
        OSError: the rename failed, and the checkpoint keeps its name. Files that cannot be removed stay under the
            hidden name, with a warning.
    """
    hidden = path.with_name(f".{path.name}.removed-{secrets.token_hex(4)}")
    os.rename(path, hidden)
    sync_directory(path.parent)
    with _warn_about_errors(hidden):
        shutil.rmtree(hidden)


def remove_leftovers(directory: Path, pattern: str = ".step_*") -> None:
    """Remove hidden directories of checkpoints that earlier runs were writing or removing. Errors are only logged."""
    for leftover in directory.glob(pattern):
        logger.info("%s: removing a leftover of an earlier run", leftover)
        with _warn_about_errors(leftover):
            shutil.rmtree(leftover)


def remove_old(directory: Path, *, keep_last: int, keep_every: int | None, best: int | None = None) -> None:
    """Remove the checkpoints that the settings do not keep; errors are only logged, and removal is tried again later.

    Args:
        directory: the run's checkpoint directory.
        keep_last: number of most recent checkpoints to keep.
        keep_every: also keep checkpoints of steps that are divisible by this. None: keep no others.
        best: step of the best checkpoint, which is kept too.
    """
    remove_leftovers(directory, ".step_*.removed-*")  # a removal that failed before
    for step in saved_steps(directory)[:-keep_last]:
        if step != best and (keep_every is None or step % keep_every):
            path = step_dir(directory, step)
            with _warn_about_errors(path):
                remove_directory(path)


@contextmanager
def _warn_about_errors(path: Path) -> Iterator[None]:
    """Turn a failed removal into a warning: an old checkpoint that stays costs disk space, but must not end the run.

    This happens on NFS, where a file that another process holds open comes back under the name .nfs...
    """
    try:
        yield
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); will try again after the next checkpoint", path, error)
