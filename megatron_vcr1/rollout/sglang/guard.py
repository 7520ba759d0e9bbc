"""Runs a server so that it never outlives the process that asked for it, however that one ends.

    python -I guard.py PARENT_PID COMMAND...

Python's own exit handlers do not run on SIGKILL, and a server has processes of its own. So a small process stands
between: it looks whether its parent is still the same, adopts whatever the server leaves behind, and on its way out
kills all of it. If it is killed itself, the kernel kills the server. Needs the standard library and psutil.
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
POLL_S = 0.2
GRACE_S = 5.0


def main(parent_pid: int, command: list[str]) -> int:
    """Run the command to its end, or to the parent's; returns its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def die_with_me() -> None:  # in the child, before the command; this process has one thread
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def stop(signum: int, frame: object) -> NoReturn:
        sys.exit(128 + signum)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_me)
        while os.getppid() == parent_pid:
            try:
                return server.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
        return 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        kill_descendants()


def kill_descendants() -> None:
    """SIGKILL: a server has nothing to save, and some of its processes ignore or outlast anything gentler."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        left = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
        if not left:
            return
        for one in left:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=0.5)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
