"""Tests with real processes: if any process of the tree ends, all processes below it end, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vcr1.rollout.sglang import guard
from tests.limits import HANG_S
from tests.rollout.sglang.conftest import wait_until_gone

# A server that ignores SIGTERM, starts a process in another session, and writes both process ids to a file.
SERVER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1] + ".part", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""
PARENT = """
import os, signal, subprocess, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])  # as a rank does
guard = subprocess.Popen([sys.executable, "-I", sys.argv[1], str(os.getpid()), *sys.argv[2:]])
time.sleep(600)
"""


def started(ids: Path) -> list[int]:
    deadline = time.monotonic() + HANG_S
    while not ids.exists():
        assert time.monotonic() < deadline, "the server has not started"
        time.sleep(0.05)
    return [int(pid) for pid in ids.read_text().split()]


def guarded(ids: Path, seconds: float = 600) -> list[str]:
    return [sys.executable, "-c", SERVER, str(ids), str(seconds)]


def test_the_server_ends_when_the_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, guard.__file__, *guarded(tmp_path / "ids")])
    pids = started(tmp_path / "ids")
    parent.kill()
    parent.wait()
    wait_until_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_when_the_guard_ends(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-I", guard.__file__, str(os.getpid()), *guarded(tmp_path / "ids")]
    process = subprocess.Popen(command)
    server, child = started(tmp_path / "ids")
    process.send_signal(number)
    process.wait()
    if number == signal.SIGKILL:  # children of the server are up to the server; SGLang's end with it
        wait_until_gone([server])
        os.kill(child, signal.SIGKILL)
    else:
        wait_until_gone([server, child])


def test_the_guard_returns_the_servers_exit_code_and_kills_its_children(tmp_path: Path) -> None:
    command = [sys.executable, "-I", guard.__file__, str(os.getpid()), *guarded(tmp_path / "ids", 0)]
    process = subprocess.Popen(command)
    pids = started(tmp_path / "ids")
    assert process.wait(HANG_S) == 0
    wait_until_gone(pids)
