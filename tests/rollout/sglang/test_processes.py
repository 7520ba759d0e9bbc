"""Tests of supervision with real processes in place of servers: start, liveness, restart, end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang import processes
from megatron_vcr1.rollout.sglang.launch import ServerSpec
from megatron_vcr1.rollout.sglang.memory import MemoryRelease
from megatron_vcr1.rollout.sglang.processes import ServerGroup
from tests.limits import HANG_S
from tests.ports import free_ports
from tests.rollout.sglang.conftest import is_alive

# Responds to everything with status 200; with "refuse" it is never ready, with "crash" it ends at once.
SCRIPT = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:]}).encode()
        self.send_response(503 if "refuse" in sys.argv else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *args):
        pass
print("stand-in starts")
if "crash" in sys.argv:
    sys.exit("no memory left on the device")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WATCH_INTERVAL_S", 0.05)


Start = Callable[..., ServerGroup]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    groups = []

    def start(*arguments: str, max_restarts: int = 1, startup_timeout_s: float = HANG_S) -> ServerGroup:
        port = free_ports()
        command = (sys.executable, "-c", SCRIPT, str(port), *arguments)
        spec = ServerSpec(port, command, os.environ, tmp_path / "server.log")
        groups.append(ServerGroup([spec], startup_timeout_s=startup_timeout_s, max_restarts=max_restarts))
        return groups[-1]

    yield start
    for group in groups:
        group.close()


def response(group: ServerGroup) -> dict[str, Any]:
    """Return the server's response, as soon as there is one."""
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            return httpx.get(group.urls[0], timeout=0.5, trust_env=False).json()
        except httpx.HTTPError:
            assert time.monotonic() < deadline, "no response"
            time.sleep(0.05)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


def response_of_new_process(group: ServerGroup, old_pid: int) -> dict[str, Any]:
    wait_for(lambda: response(group)["pid"] != old_pid)
    return response(group)


def test_close_ends_a_ready_server(start: Start) -> None:
    group = start()
    group.wait_until_ready()
    pid = response(group)["pid"]
    group.close()
    assert not is_alive(pid)


def test_a_killed_server_is_restarted_until_no_restart_is_left(start: Start) -> None:
    group = start(max_restarts=1)
    group.wait_until_ready()
    first = response(group)["pid"]
    os.kill(first, signal.SIGKILL)
    second = response_of_new_process(group, first)["pid"]
    group.wait_until_ready()
    os.kill(second, signal.SIGKILL)
    wait_for(lambda: group.failure(group.urls[0]))
    failure = group.failure(group.urls[0])
    assert failure is not None
    assert "ended with exit code" in failure and "no restart left (sglang.max_restarts)" in failure
    assert failure.count("stand-in starts") == 2  # the log keeps the output of both, and is quoted


def test_a_hung_server_is_replaced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    group = start()
    group.wait_until_ready()
    pid = response(group)["pid"]
    os.kill(pid, signal.SIGSTOP)
    # Only now, and until it is killed: on a busy machine, a good server may miss such short probes, too.
    with monkeypatch.context() as patch:
        patch.setattr(processes, "PROBE_INTERVAL_S", 0.5)
        wait_for(lambda: not is_alive(pid))
    response_of_new_process(group, pid)


def test_a_restart_can_load_other_weights(start: Start) -> None:
    group = start()
    group.wait_until_ready()
    pid = response(group)["pid"]
    group.set_restart_weights(group.urls[0], Path("somewhere"), "3@run")
    group.restart(group.urls[0], "refused an update")
    arguments = response_of_new_process(group, pid)["arguments"]
    assert arguments[1:] == ["--model-path", "somewhere", "--load-format", "auto", "--weight-version", "3@run"]


def test_nothing_is_restarted_while_memory_is_released(start: Start) -> None:
    group = start()
    group.wait_until_ready()
    pid = response(group)["pid"]
    group.pause_restarts()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(httpx.HTTPError):
        httpx.get(group.urls[0], timeout=0.5, trust_env=False)
    group.resume_restarts()
    response_of_new_process(group, pid)


def test_a_check_that_is_under_way_restarts_nothing_after_the_pause(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher may wait for a response while another thread pauses restarts, and decide afterwards."""
    group = start()
    group.wait_until_ready()
    pid = response(group)["pid"]
    [server] = group._servers
    is_checking, is_paused, is_checked = threading.Event(), threading.Event(), threading.Event()

    def slow_check() -> str:
        is_checking.set()
        assert is_paused.wait(HANG_S)
        is_checked.set()
        return "does not respond"

    monkeypatch.setattr(server, "check", slow_check)
    assert is_checking.wait(HANG_S)
    group.pause_restarts()
    is_paused.set()
    assert is_checked.wait(HANG_S)
    group.close()  # waits for the end of the check, in which the watcher would have replaced the server
    assert server.restarts_left == 1 and server.ready.is_set() and not is_alive(pid)


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_servers_survive_the_signals_of_the_job(start: Start, number: signal.Signals) -> None:
    """A scheduler sends them to every process of a job; the rank still needs its servers to finish the step."""
    group = start()
    group.wait_until_ready()
    pid = response(group)["pid"]
    for guard_pid in group.guard_pids():
        tree = [psutil.Process(guard_pid), *children_of(guard_pid)]
        assert pid in [process.pid for process in tree]
        for process in tree:
            process.send_signal(number)
    time.sleep(0.5)
    assert response(group)["pid"] == pid and group.is_ready(group.urls[0])
    group.close()  # the rank can still end them
    assert not any(is_alive(process.pid) for process in tree)


def test_a_release_waits_for_starting_servers_and_kills_those_that_fail(start: Start) -> None:
    """A server that starts would allocate memory during training, and a server that fails would keep it."""
    group = start(max_restarts=2)
    memory = MemoryRelease(group.urls, group, timeout_s=HANG_S)
    memory.resume()  # the server is not ready yet; on a busy machine it may be, and is then restarted twice
    memory.release()
    assert group.is_ready(group.urls[0]) and group.restarts_paused  # `release` has waited
    with pytest.raises(httpx.HTTPError):
        httpx.get(group.urls[0], timeout=0.5, trust_env=False)  # it cannot release memory, and was killed
    memory.resume()
    assert response(group)  # it was restarted


def test_a_server_that_cannot_start_fails_with_the_end_of_its_log(start: Start) -> None:
    with pytest.raises(EngineError, match=r"(?s)ended with exit code 1.*no memory left on the device"):
        start("crash", max_restarts=1).wait_until_ready()


def test_a_server_that_is_never_ready_fails_after_the_timeout(start: Start) -> None:
    with pytest.raises(EngineError, match=r"was not ready within 1 s \(sglang.startup_timeout_s\)"):
        start("refuse", max_restarts=0, startup_timeout_s=1).wait_until_ready()


def test_failed_starts_use_up_the_restarts(start: Start, tmp_path: Path) -> None:
    group = start(max_restarts=3)
    group.wait_until_ready()
    pid = response(group)["pid"]
    log = tmp_path / "server.log"
    log.rename(tmp_path / "old.log")
    log.mkdir()  # opening it as a file fails
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: group.failure(group.urls[0]))
    failure = group.failure(group.urls[0])
    assert failure is not None
    assert "no restart left (sglang.max_restarts)" in failure and "Its log cannot be read" in failure


def test_a_port_that_another_server_uses_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.guard, "KILL_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        spec = ServerSpec(port, (sys.executable, "-c", "pass"), os.environ, tmp_path / "server.log")
        with pytest.raises(UserError, match=f"sglang.port: port {port}"):
            ServerGroup([spec], startup_timeout_s=1, max_restarts=0)
