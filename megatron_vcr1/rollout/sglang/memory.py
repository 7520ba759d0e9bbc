"""Release and resume of the GPU memory of colocated servers: training uses it while nothing is sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, weight_version
from megatron_vcr1.rollout.sglang.processes import ServerGroup

logger = logging.getLogger(__name__)

RELEASED = "released:"
"""Prefix of a server's weight version while its memory is released.

The server stores this marker, so it survives a trainer that is killed and disappears with the server. Without it, the
next trainer could not know whether memory is released: SGLang does not report it, and its scheduler ends if it is told
to resume memory that it has not released. The marker is set before the release. If a trainer is killed in the
millisecond between the two calls, the server ends at the next resume, and its supervisor restarts it.
"""


class MemoryRelease:
    """Makes the colocated servers of a replica release and resume their GPU memory (KV cache, weights, CUDA graphs).

    While their memory is released, servers keep a copy of their weights in host memory (--enable-weights-cpu-backup),
    from which the resume restores them. The replica leader calls the methods, from one thread at a time. On other
    ranks, there are no servers and the methods do nothing.
    """

    def __init__(self, urls: Sequence[str], processes: ServerGroup | None, *, timeout_s: float) -> None:
        """
        Args:
            urls: servers that release their memory; both methods do nothing if there are none.
            processes: supervises those of the servers that this job started.
            timeout_s: maximum time for a call to a server.
        """
        self._urls = urls
        self._processes = processes
        self._timeout_s = timeout_s

    def release(self) -> None:
        """Make all servers release their memory.

        A server that fails to do it is killed if this job started it, because its memory is needed. A server that
        somebody else supervises keeps its memory.
        """
        if self._urls and self._processes is not None:
            # A server that is starting cannot release memory yet, and would allocate it during training.
            self._processes.pause_restarts()
        # Killed servers stay down until `resume`, because the watcher restarts nothing meanwhile.
        for url in self._on_each_server(release_memory):
            if self._processes is not None:
                self._processes.kill(url)

    def resume(self) -> None:
        """Make all servers allocate their memory again. A server that fails is restarted if this job started it."""
        # Before the calls, so that servers that died or were killed meanwhile start while the others resume.
        if self._processes is not None:
            self._processes.resume_restarts()
        for url, error in self._on_each_server(resume_memory).items():
            if self._processes is not None:
                self._processes.restart(url, f"did not resume its memory: {error}")

    def _on_each_server(self, call_server: Callable[..., None]) -> dict[str, Exception]:
        """Call a function for all servers at once, because each copies its weights to or from the host.

        Returns:
            The servers for which it failed, with their errors.
        """
        failed: dict[str, Exception] = {}

        def attempt(url: str) -> None:
            try:
                call_server(url, timeout_s=self._timeout_s)
            except (ServerFault, RequestRefused) as error:
                logger.warning("memory of an SGLang server: %s", error)
                failed[url] = error

        if self._urls:
            with ThreadPoolExecutor(len(self._urls)) as threads:
                list(threads.map(attempt, self._urls))
        return failed


def release_memory(url: str, *, timeout_s: float) -> None:
    """Make a server release its memory, unless it is released already.

    The order of the calls matters: SGLang releases memory only while it is idle and paused, and the marker must be set
    before memory is released (see `RELEASED`).

    Raises:
        ServerFault, RequestRefused: a call failed. If the server still responds, it has its version back and continues.
    """
    version = weight_version(url)
    if version.startswith(RELEASED):
        return
    call(url, "POST", "/pause_generation", {"mode": "abort"}, timeout_s=timeout_s)
    _set_version(url, RELEASED + version, timeout_s)
    try:
        call(url, "POST", "/release_memory_occupation", {}, timeout_s=timeout_s)
    except (ServerFault, RequestRefused) as error:
        # An unreachable server keeps the marker: it may still complete the release after the timeout.
        if isinstance(error, RequestRefused) or not error.unreachable:
            _set_version(url, version, timeout_s)
            call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s)
        raise


def resume_memory(url: str, *, timeout_s: float) -> None:
    """Make a server allocate its memory again, if it is released, and continue. Raises ServerFault, RequestRefused."""
    version = weight_version(url)
    if version.startswith(RELEASED):
        call(url, "POST", "/resume_memory_occupation", {}, timeout_s=timeout_s)
        _set_version(url, version.removeprefix(RELEASED), timeout_s)
        call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s)


def _set_version(url: str, version: str, timeout_s: float) -> None:
    body = {"new_version": version, "abort_all_requests": False}
    call(url, "POST", "/update_weight_version", body, timeout_s=timeout_s)
