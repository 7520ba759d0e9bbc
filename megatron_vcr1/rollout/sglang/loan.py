"""The memory of colocated servers, which is training's while no one samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, weights_of
from megatron_vcr1.rollout.sglang.processes import ServerGroup

logger = logging.getLogger(__name__)

LENT = "lent:"
"""Before the version of a server's weights while its memory is lent.

The server itself keeps the mark: it outlives a trainer that is killed, and goes with the server. Without it one could
not know: SGLang does not tell, and ends when it is to take back what it has not given. (It does if a trainer was killed
in the millisecond between mark and call; whoever watches it starts it anew.)
"""


class MemoryLoan:
    """Servers that give their GPU memory (KV cache, weights, CUDA graphs) away and take it back.

    They keep their weights on the host meanwhile (--enable-weights-cpu-backup), so that they are whole afterwards.
    """

    def __init__(self, urls: Sequence[str], processes: ServerGroup | None, *, timeout_s: float) -> None:
        self._urls = urls
        self._processes = processes
        self._timeout_s = timeout_s

    def lend(self) -> None:
        """Free the memory. One that fails is killed where this job started it, and keeps its memory elsewhere."""
        if self._urls and self._processes is not None:
            self._processes.settle()  # one that is starting takes its memory yet, and cannot give it before it is ready
            self._processes.held = True
        for url in self._on_each(lend):
            if self._processes is not None:
                self._processes.end(url)

    def take_back(self) -> None:
        """Have the memory again. One that fails is of no use, and is started anew where this job started it."""
        if self._processes is not None:
            self._processes.held = False
        for url, error in self._on_each(take_back).items():
            if self._processes is not None:
                self._processes.restart(url, f"did not take its memory back: {error}")

    def _on_each(self, call_server: Callable[..., None]) -> dict[str, Exception]:
        """The servers that failed, and how. At the same time: each copies its weights to the host, or from it."""
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


def lend(url: str, *, timeout_s: float) -> None:
    """Have a server free its memory; nothing, if it has. Raises ServerFault, RequestRefused."""
    weights = weights_of(url)
    if weights.startswith(LENT):
        return
    call(url, "POST", "/pause_generation", {"mode": "abort"}, timeout_s=timeout_s)  # it frees only while it is idle
    _set_version(url, LENT + weights, timeout_s)
    try:
        call(url, "POST", "/release_memory_occupation", {}, timeout_s=timeout_s)
    except (ServerFault, RequestRefused) as error:
        if isinstance(error, RequestRefused) or not error.gone:  # of one that is silent, it is only a matter of time
            _set_version(url, weights, timeout_s)
            call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s)
        raise


def take_back(url: str, *, timeout_s: float) -> None:
    """Have a server use its memory again; nothing, if it is not lent. Raises ServerFault, RequestRefused."""
    weights = weights_of(url)
    if weights.startswith(LENT):
        call(url, "POST", "/resume_memory_occupation", {}, timeout_s=timeout_s)
        _set_version(url, weights.removeprefix(LENT), timeout_s)
        call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s)


def _set_version(url: str, weights: str, timeout_s: float) -> None:
    body = {"new_version": weights, "abort_all_requests": False}
    call(url, "POST", "/update_weight_version", body, timeout_s=timeout_s)
