"""Supervision of a node's server processes: they are started, watched, restarted, and never left behind.

The process tree, from the rank that owns a server:

    rank                  owns a `ServerGroup`, whose watcher thread starts and restarts the server
      guard.py            one per server; ends when the rank has ended, or on SIGHUP or SIGINT
        SGLang server     `python -m sglang.launch_server`; gets SIGKILL when its guard ends
          scheduler, ...  SGLang's own processes; the guard kills them, too

A job scheduler sends SIGTERM or SIGUSR1 to every process of a job. Both signals are blocked in guards and servers, so
that servers keep working until the rank has saved. A rank ends a server with SIGHUP to its guard. If the rank itself is
killed (SIGKILL runs no exit handler), the guard notices within a fraction of a second that its parent has changed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_vcr1.data.signals import block_job_signals_in_children
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang import guard
from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, is_ready
from megatron_vcr1.rollout.sglang.launch import ServerSpec

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0
"""Time between two checks of a process by the watcher thread."""
PROBE_INTERVAL_S = 30.0
"""Time between two liveness probes of a ready server, and the timeout of a probe."""
MAX_FAILED_PROBES = 3
LOG_LINES = 15
"""Lines of a server's log that an error message quotes."""


class ServerGroup:
    """The running servers of one rank. A watcher thread restarts servers that end or stop responding.

    Threads: the constructor starts every server and then the watcher, a daemon thread. After that, only the watcher
    starts processes, and it is the only thread that restarts them. Other threads (the main thread, or the thread that
    samples) mark a server as dead or stop it, and the watcher notices that in its next check. `close` joins the watcher
    before it stops the servers, so no server can be started after `close` has returned.
    """

    def __init__(self, specs: Sequence[ServerSpec], *, startup_timeout_s: float, max_restarts: int) -> None:
        """Start the servers without waiting for them; `wait_until_ready` waits.

        Args:
            specs: how to start each server.
            startup_timeout_s: maximum time from the start of a server until it is ready.
            max_restarts: number of times that each server may be restarted.

        Raises:
            UserError: a port is in use. It may belong to the server of another run, which must not be mistaken for the
                new one.
        """
        for spec in specs:
            _wait_for_free_port(spec.host, spec.port)
        self._servers = [ServerProcess(spec, startup_timeout_s, max_restarts) for spec in specs]
        self._closing = threading.Event()
        self.restarts_paused = False
        """Set while the servers' memory is released: training uses it, and a new server would not find enough."""
        self._restart_lock = threading.Lock()  # held during a restart, and while restarts are paused or resumed
        self._watcher = threading.Thread(target=self._watch, name="sglang-watcher", daemon=True)
        try:
            for server in self._servers:
                server.start()
        except BaseException:
            self.close()
            raise
        self._watcher.start()

    @property
    def urls(self) -> list[str]:
        return [server.spec.url for server in self._servers]

    def wait_until_ready(self) -> None:
        """Wait until all servers are ready.

        Raises:
            EngineError: a server has failed and has no restart left; the message quotes the end of its log.
        """
        for server in self._servers:
            while not server.ready.wait(0.1):
                if server.failure is not None:
                    raise EngineError(server.failure)

    def wait_until_started(self) -> None:
        """Wait until no server is starting: each is ready, or has failed for good. Does not raise."""
        for server in self._servers:
            while not server.ready.wait(0.1) and server.failure is None:
                continue

    def pause_restarts(self) -> None:
        """Wait until no server is starting, and restart none until `resume_restarts`.

        When it returns, no restart is under way, either: the watcher restarts servers under the same lock.
        """
        while True:
            self.wait_until_started()
            with self._restart_lock:
                # A server may have been restarted between the two lines above.
                if all(server.ready.is_set() or server.failure is not None for server in self._servers):
                    self.restarts_paused = True
                    return

    def resume_restarts(self) -> None:
        """Let the watcher restart servers again, also those that have ended meanwhile."""
        with self._restart_lock:
            self.restarts_paused = False

    def is_ready(self, url: str) -> bool:
        """Return whether the server at a URL has completed its start-up."""
        return any(server.ready.is_set() for server in self._at(url))

    def failure(self, url: str) -> str | None:
        """Return why the server at a URL will not come back, or None if it is running or may be restarted."""
        return next((server.failure for server in self._at(url)), None)

    def set_restart_weights(self, url: str, model_dir: Path, weight_version: str) -> None:
        """Make restarts of a server load these weights instead of those that the run started with.

        Args:
            url: the server.
            model_dir: a Hugging Face directory, which must exist until the next call.
            weight_version: the version that the server reports for these weights.
        """
        arguments = ("--model-path", str(model_dir), "--load-format", "auto", "--weight-version", weight_version)
        for server in self._at(url):
            server.extra_arguments = arguments

    def restart(self, url: str, reason: str) -> None:
        """Have the watcher kill and restart a server that cannot be used any more; returns at once."""
        for server in self._at(url):
            server.mark_dead(reason)

    def kill(self, url: str) -> None:
        """Kill a server and wait until it is gone. The watcher restarts it once `restarts_paused` is false."""
        for server in self._at(url):
            server.stop()

    def guard_pids(self) -> list[int]:
        """Return the process ids of the guards (see guard.py), for tests."""
        return [server.popen.pid for server in self._servers if server.popen is not None]

    def close(self) -> None:
        """Stop the watcher, then kill all servers and wait until they are gone."""
        self._closing.set()
        # The watcher must end first: it could restart a server that has just been stopped. It is not alive yet if the
        # constructor failed.
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join()
        for server in self._servers:
            server.stop()

    def _at(self, url: str) -> list[ServerProcess]:
        return [server for server in self._servers if server.spec.url == url]

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_INTERVAL_S):
            for server in self._servers if not self.restarts_paused else ():
                try:
                    reason = server.check()  # may wait for a response, so it does not hold the lock
                    with self._restart_lock:
                        if reason is not None and not self.restarts_paused:
                            server.replace(reason)
                except OSError as error:  # no memory or disk space to start it; the next check tries again
                    logger.warning("SGLang server %s: %s", server.spec.url, error)


def _wait_for_free_port(host: str, port: int) -> None:
    """Wait until a port is free: the guard of a killed run needs a few seconds to end its server."""
    deadline = time.monotonic() + 2 * guard.KILL_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind((host, port))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"sglang.port: port {port} of {host} cannot be used ({error.strerror}); set another port"
                    ) from None
        time.sleep(0.2)


class ServerProcess:
    """One server and its restarts.

    `start` is called by the constructor of `ServerGroup`, and later only by the watcher, which is also the only thread
    that calls `check` and `replace`. All other methods may be called from any thread.
    """

    def __init__(self, spec: ServerSpec, startup_timeout_s: float, max_restarts: int) -> None:
        self.spec = spec
        self.startup_timeout_s = startup_timeout_s
        self.restarts_left = max_restarts
        self.extra_arguments: tuple[str, ...] = ()  # appended to the command: of two equal arguments, the last counts
        self.popen: subprocess.Popen[bytes] | None = None
        self.ready = threading.Event()
        self.failure: str | None = None
        """The reason why the server will not be restarted any more; None while it may be."""
        self._death_reason: str | None = None
        self._started_at_s = self._probed_at_s = 0.0
        self._num_failed_probes = 0

    def start(self) -> None:
        """Start the server below a guard process. Its output is appended to the log, after the command."""
        spec = self.spec
        server = [*spec.command, *self.extra_arguments]
        command = [sys.executable, "-I", guard.__file__, str(os.getpid()), *server]
        with spec.log.open("ab") as log, block_job_signals_in_children():
            log.write(f"{' '.join(server)}\n".encode())
            log.flush()  # before the server writes to the same file
            self.popen = subprocess.Popen(
                command, env=dict(spec.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._started_at_s = self._probed_at_s = time.monotonic()
        self._num_failed_probes, self._death_reason = 0, None
        logger.info("SGLang server on port %d starts; its log is %s", spec.port, spec.log)

    def mark_dead(self, reason: str) -> None:
        """Have the watcher's next check replace the server. A server that is starting is left alone."""
        if self.ready.is_set():
            self._death_reason = reason

    def check(self) -> str | None:
        """Detect that the server is ready, has ended or does not respond.

        Returns:
            Why the server must be replaced; None if it need not be. If it is not replaced, a later check says so again.
        """
        if self.failure is not None or self.popen is None:
            return None
        code = self.popen.poll()  # the guard ends with its server's exit code
        if code is not None:
            return f"ended with exit code {code}"
        if self._death_reason is not None:
            return self._death_reason
        if not self.ready.is_set():
            if is_ready(self.spec.url):
                self.ready.set()
                logger.info("SGLang server %s is ready", self.spec.url)
            elif time.monotonic() - self._started_at_s > self.startup_timeout_s:
                return f"was not ready within {self.startup_timeout_s:.0f} s (sglang.startup_timeout_s)"
        elif time.monotonic() - self._probed_at_s > PROBE_INTERVAL_S:
            return self._probe()
        return None

    def _probe(self) -> str | None:
        try:
            call(self.spec.url, "GET", "/model_info", timeout_s=PROBE_INTERVAL_S)
            self._num_failed_probes = 0
        except (ServerFault, RequestRefused):
            # A busy server may miss a probe; a single one is no reason to lose all of its requests.
            self._num_failed_probes += 1
        self._probed_at_s = time.monotonic()
        if self._num_failed_probes < MAX_FAILED_PROBES:
            return None
        return f"has not responded for {MAX_FAILED_PROBES * PROBE_INTERVAL_S:.0f} s"

    def replace(self, reason: str) -> None:
        """Stop the server, and start it again if it has a restart left; otherwise set `failure`."""
        self.stop()  # also if it has ended: its guard may still be killing the server's other processes
        self.ready.clear()
        event = f"SGLang server {self.spec.url} {reason}"
        if self.restarts_left == 0:
            self.failure = f"{event}, and has no restart left (sglang.max_restarts). {self.log_tail()}"
            logger.error("%s", self.failure)
            return
        # Counted before the start: a start that fails uses up a restart, too, so the number of attempts is limited.
        self.restarts_left -= 1
        logger.warning("%s; it is restarted (%d restarts left)", event, self.restarts_left)
        self.start()

    def stop(self) -> None:
        """End the server and wait for it: SIGHUP to the guard, which kills the server and all of its processes.

        Not SIGTERM, which is blocked in the guard. The guard cannot wait for one from its parent, either: the kernel
        merges it with a SIGTERM of the scheduler that is still pending.
        """
        if self.popen is None:
            return
        self.popen.send_signal(signal.SIGHUP)
        try:
            self.popen.wait(2 * guard.KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()  # the kernel then kills the server (PR_SET_PDEATHSIG)
            self.popen.wait()

    def log_tail(self) -> str:
        """Return the end of the log, for an error message."""
        try:
            lines = self.spec.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        except OSError as error:
            return f"Its log cannot be read: {error}"
        return "\n  ".join([f"{self.spec.log} ends with:", *lines])
