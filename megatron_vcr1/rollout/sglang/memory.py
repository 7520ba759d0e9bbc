"""Release and resume of the GPU memory of colocated servers: training uses it while nothing is sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, weight_version
from megatron_vcr1.rollout.sglang.processes import ServerGroup

logger = logging.getLogger(__name__)

RELEASED = "released:"
"""Prefix of a server's weight version while its memory is released."""

WEIGHTS_ONLY = "weights only:"
"""Prefix of a server's weight version while it has memory for its weights only, before and during a weight sync.

The server stores these markers, so they survive a trainer that is killed and disappear with the server. Without them,
the next trainer could not know which memory is released: SGLang does not report it, and its scheduler ends if it is
told to resume memory that it has not released. `RELEASED` is set before the release, and removed after the resume. If a
trainer is killed in the millisecond between the two calls, the server ends at the next resume, and its supervisor
restarts it.
"""

# SGLang's tags of memory. Memory of CUDA graphs is released if SGLANG_MEMORY_SAVER_CUDA_GRAPH is set.
_WEIGHTS = ("weights",)
_ALL_BUT_WEIGHTS = ("cuda_graph", "kv_cache")
_ALL: tuple[str, ...] = (*_WEIGHTS, *_ALL_BUT_WEIGHTS)


class MemoryRelease:
    """Makes the colocated servers of a replica release and resume their GPU memory (weights, KV cache, CUDA graphs).

    The weights can be resumed first (`resume_weights`), and the rest after a weight sync (`resume`).

    While their memory is released, servers keep a copy of their weights in host memory (--enable-weights-cpu-backup),
    from which the resume restores them. The replica leader calls the methods, from one thread at a time. On other
    ranks, there are no servers and the methods do nothing.
    """

    def __init__(self, urls: Sequence[str], processes: ServerGroup | None, *, timeout_s: float) -> None:
        """
        Args:
            urls: servers that release their memory; the methods do nothing if there are none.
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

    def resume_weights(self) -> None:
        """Make all servers allocate the memory of their weights, for a weight sync; they stay paused.

        The buckets of the sync need GPU memory of this process, which the KV cache gets afterwards.
        """
        self._resume(resume_weights)

    def resume(self) -> None:
        """Make all servers allocate the rest of their memory again, and continue."""
        self._resume(resume_memory)

    def _resume(self, resume_server: Callable[..., None]) -> None:
        """Resume memory of all servers. A server that fails is restarted if this job started it."""
        # Before the calls, so that servers that died or were killed meanwhile start while the others resume.
        if self._processes is not None:
            self._processes.resume_restarts()
        for url, error in self._on_each_server(resume_server).items():
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
    """Make a server release all of its memory that is not released yet.

    The order of the calls matters: SGLang releases memory only while it is idle and paused, and the marker must be set
    before memory is released (see `WEIGHTS_ONLY`).

    Raises:
        ServerFault, RequestRefused: a call failed. If the server still responds, it has its version back and continues.
    """
    version = weight_version(url)
    if version.startswith(RELEASED):
        return
    has_weights_only = version.startswith(WEIGHTS_ONLY)
    call(url, "POST", "/pause_generation", {"mode": "abort"}, timeout_s=timeout_s)
    _set_version(url, RELEASED + version.removeprefix(WEIGHTS_ONLY), timeout_s)
    try:
        tags = _WEIGHTS if has_weights_only else _ALL
        call(url, "POST", "/release_memory_occupation", {"tags": tags}, timeout_s=timeout_s)
    except (ServerFault, RequestRefused) as error:
        # An unreachable server keeps the marker: it may still complete the release after the timeout.
        if isinstance(error, RequestRefused) or not error.unreachable:
            _set_version(url, version, timeout_s)
            if not has_weights_only:
                call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s)
        raise


def resume_weights(url: str, *, timeout_s: float) -> None:
    """Make a server allocate the memory of its weights, if it is released. Raises ServerFault, RequestRefused."""
    version = weight_version(url)
    if version.startswith(RELEASED):
        _resume_tags(url, _WEIGHTS, WEIGHTS_ONLY + version.removeprefix(RELEASED), timeout_s)


def resume_memory(url: str, *, timeout_s: float) -> None:
    """Make a server allocate all memory that is released, and continue. Raises ServerFault, RequestRefused."""
    version = weight_version(url)
    if version.startswith(RELEASED):
        _resume_tags(url, _ALL, version.removeprefix(RELEASED), timeout_s)
    elif version.startswith(WEIGHTS_ONLY):
        _resume_tags(url, _ALL_BUT_WEIGHTS, version.removeprefix(WEIGHTS_ONLY), timeout_s)
    else:
        return
    call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s)


def has_weights_only(url: str) -> bool:
    """Return whether a server has memory for its weights only. False if it does not respond."""
    try:
        return weight_version(url).startswith(WEIGHTS_ONLY)
    except (ServerFault, RequestRefused):
        return False


def _resume_tags(url: str, tags: Sequence[str], version: str, timeout_s: float) -> None:
    call(url, "POST", "/resume_memory_occupation", {"tags": tags}, timeout_s=timeout_s)
    _set_version(url, version, timeout_s)


def _set_version(url: str, version: str, timeout_s: float) -> None:
    body = {"new_version": version, "abort_all_requests": False}
    call(url, "POST", "/update_weight_version", body, timeout_s=timeout_s)
