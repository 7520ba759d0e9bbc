"""Runs a server and makes sure that it never outlives the process that started the guard, however that process ends.

    python -I guard.py PARENT_PID COMMAND...

Exit handlers do not run when a process is killed by SIGKILL, and a server has processes of its own. So this small
process runs between the two and covers every case:

    the parent ends (even by SIGKILL)   The kernel gives the guard another parent. The guard polls for that and ends.
    the guard gets SIGHUP, SIGINT or    It raises SystemExit, and the `finally` block kills all descendants.
    SIGTERM
    the guard is killed by SIGKILL or   The kernel kills the server (PR_SET_PDEATHSIG). The server's own processes are
    another signal (SIGUSR1)            up to the server: SGLang's end with it.
    the server ends                     The guard kills what is left of its processes, and returns its exit code.

A rank starts guards with SIGTERM and SIGUSR1 blocked, and everything below them inherits that: a job scheduler sends
both to all processes of a job, and servers must work until the rank has saved. The rank itself sends SIGHUP.

Processes whose own parent has ended become children of the guard (PR_SET_CHILD_SUBREAPER), so it still finds them. This
file is run by itself (-I: isolated mode) and only needs the standard library and psutil.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
POLL_INTERVAL_S = 0.2
KILL_TIMEOUT_S = 5.0
"""Maximum time that `kill_descendants` keeps trying."""


def main(parent_pid: int, command: list[str]) -> int:
    """Run the command until it ends or the parent ends, then kill everything that it has started.

    Returns:
        The exit code of the command, or 1 if the parent has ended.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def kill_with_guard() -> None:
        # Runs in the child between fork and exec, which is safe because the guard has a single thread. A rank could not
        # do the same for a server: the signal is sent when the thread that started the child ends, not the process.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def stop(signum: int, frame: object) -> NoReturn:
        sys.exit(128 + signum)

    # Before the server is started: a signal at any later moment finds the handler, and the `finally` block runs.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=kill_with_guard)
        # A comparison with the given id also detects a parent that had ended before the guard came this far.
        while os.getppid() == parent_pid:
            try:
                return server.wait(POLL_INTERVAL_S)
            except subprocess.TimeoutExpired:
                continue
        return 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        kill_descendants()


def kill_descendants() -> None:
    """Send SIGKILL to all descendants until none is left. A server has no state to save, and may ignore SIGTERM.

    The loop finds processes that were started, or that became children of the guard, after the last pass.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        descendants = psutil.Process().children(recursive=True)
        running = [process for process in descendants if _is_running(process)]
        if not running:
            return
        for process in running:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(running, timeout=0.5)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has ended since it was listed, and its parent has noticed
        return False


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
