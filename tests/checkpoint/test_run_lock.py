from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from megatron_vcr1.checkpoint import run_lock
from megatron_vcr1.checkpoint.run_lock import lock_run
from megatron_vcr1.errors import UserError


def _hold_lock(directory: Path, holds: Connection, release: Connection) -> None:
    with (directory / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        holds.send(True)
        release.recv()


def test_lock_run_waits_for_a_lock_of_another_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("spawn")
    holds, theirs = context.Pipe(duplex=False)
    release, ours = context.Pipe(duplex=False)
    process = context.Process(target=_hold_lock, args=(tmp_path, theirs, release))
    process.start()
    holds.recv()
    with (
        mock.patch.object(run_lock, "LOCK_TIMEOUT_S", 0.0),
        pytest.raises(UserError, match="another process is training here; end it"),
    ):
        lock_run(tmp_path)
    # Not time.sleep itself, which other threads may call.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: ours.send(True) or process.join())
    with mock.patch.object(run_lock, "time", clock):
        lock_run(tmp_path).close()
    assert "another process holds this directory's lock; waiting up to 120 s" in caplog.text


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING):
        lock_run(tmp_path).close()
    assert "does not support locks" in caplog.text
