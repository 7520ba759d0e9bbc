"""The memory of colocated servers, which is training's while no one samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call
from megatron_vcr1.rollout.sglang.processes import ServerGroup

logger = logging.getLogger(__name__)


class MemoryLoan:
    """Servers that give their GPU memory (KV cache, weights, CUDA graphs) away and take it back.

    They keep their weights on the host meanwhile (--enable-weights-cpu-backup), so that they are whole afterwards.
    """

    def __init__(self, urls: Sequence[str], processes: ServerGroup | None, *, timeout_s: float) -> None:
        self._urls = urls
        self._processes = processes
        self._timeout_s = timeout_s
        self._lent: set[str] = set()

    def lend(self) -> None:
        """Free the memory. One that fails keeps it, and says so in the log."""
        if self._urls and self._processes is not None:
            self._processes.held = True
        for url in self._urls:
            if self._post(url, "/pause_generation", {"mode": "abort"}):  # SGLang gives memory up only when it is idle
                if self._post(url, "/release_memory_occupation", {}):
                    self._lent.add(url)
                else:
                    self._post(url, "/continue_generation", {})

    def take_back(self) -> None:
        """Have the memory again. One that fails is of no use, and is started anew where this job started it."""
        if self._processes is not None:
            self._processes.held = False
        for url in sorted(self._lent):
            taken = self._post(url, "/resume_memory_occupation", {}) and self._post(url, "/continue_generation", {})
            if not taken and self._processes is not None:
                self._processes.restart(url, "did not take its memory back")
        self._lent.clear()

    def _post(self, url: str, path: str, body: object) -> bool:
        try:
            call(url, "POST", path, body, timeout_s=self._timeout_s)
        except (ServerFault, RequestRefused) as error:
            logger.warning("memory of an SGLang server: %s", error)
            return False
        return True
