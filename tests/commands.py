"""Run `vcr1` commands in processes of their own.

The processes are forks of one that has imported everything. A fresh interpreter would do the same, but its imports
take ten seconds of a core.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.limits import HANG_S
from tests.ports import free_ports

GRACE_S = 10.0  # for the messages of the other ranks, after one has failed


class Process:
    """A process that calls a function, with standard output and standard error in files.

    It is the leader of a session of its own.
    """

    def __init__(
        self,
        function: Callable[..., int | None],
        *args: Any,
        stdout: Path,
        stderr: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            function: a module-level function; its result is the exit code.
            stdout: the file to append to, like stderr.
            environment: variables to set.
        """
        self._process = start_forked(_call, function, args, stdout, stderr, cwd, dict(environment or {}))

    @property
    def pid(self) -> int:
        """The process's id, which is also the id of its session."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float = HANG_S) -> int:
        """Wait for the end and return the exit code.

        Raises:
            AssertionError: the process has not ended in time; it is killed.
        """
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            self.kill()
        assert code is not None, f"process {self.pid} has not ended within {timeout_s} s"
        return code

    def kill(self) -> None:
        """Kill this process alone."""
        os.kill(self.pid, signal.SIGKILL)

    def end_session(self) -> None:
        """Kill this process and all that it has started, if any are left."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    @property
    def sentinel(self) -> int:
        """Becomes readable when the process ends."""
        return self._process.sentinel


def start_forked(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """Start a process that calls a module-level function, as a fork of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def vcr1(*argv: object) -> int:
    """Run a command in this process and return its exit code; an argument for `Process`."""
    from megatron_vcr1.cli.main import main

    return main([str(value) for value in argv])


def run_vcr1(*argv: object, ranks: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command on a number of ranks, as torchrun does; return what they wrote, and the first failure's code.

    If a rank fails, the others may wait for it in a collective: they are killed soon afterwards.
    """
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        processes = [
            Process(
                vcr1,
                *argv,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd,
                environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else None,
            )
            for rank in range(ranks)
        ]
        try:
            code = _first_failure(processes)
        finally:
            for process in processes:
                process.end_session()
        return subprocess.CompletedProcess(list(map(str, argv)), code, stdout.read_text(), stderr.read_text())


def _first_failure(processes: Sequence[Process]) -> int:
    """Wait for the end of all processes, or for the first failure and a moment more, and return its code; 0 without."""
    code, running, deadline = 0, list(processes), time.monotonic() + HANG_S
    while running and (left_s := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left_s)
        code = code or next((ended for process in running if (ended := process.poll())), 0)
        running = [process for process in running if process.poll() is None]
        if code:
            deadline = min(deadline, time.monotonic() + GRACE_S)
    assert code or not running, f"{len(running)} processes have not ended within {HANG_S} s"
    return code


def _call(
    function: Callable[..., int | None],
    args: tuple[Any, ...],
    stdout: Path,
    stderr: Path,
    cwd: Path | None,
    environment: dict[str, str],
) -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the fork server of decoding workers has blocked signals
    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.environ |= environment
    if cwd is not None:
        os.chdir(cwd)
    # pytest's fork server has started this process, which must start one of its own, as a fresh interpreter does.
    forkserver._forkserver.__init__()
    resource_tracker._resource_tracker.__init__()
    sys.exit(function(*args))
