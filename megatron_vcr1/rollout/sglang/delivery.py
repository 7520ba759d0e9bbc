"""The policy's weights on their way to the servers that a copy of the model owns."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from megatron_vcr1.config.schema import SglangSection
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang.channels import BroadcastChannel, DiskChannel, SharedMemoryChannel
from megatron_vcr1.rollout.sglang.fleet import Fleet
from megatron_vcr1.rollout.sglang.http import INITIAL_WEIGHTS, RequestRefused, ServerFault, is_ready, weights_of
from megatron_vcr1.rollout.sglang.weight_sync import Channel, NamedTensors, WeightUpdate

logger = logging.getLogger(__name__)

POLL_S = 0.5


class WeightDelivery:
    """On the rank that talks to servers. A pass is `await_servers`, `open`, `send` each bucket, `close`.

    Attributes:
        weights: the version that servers must report.
        current: the servers that were last seen with it.
    """

    def __init__(self, fleet: Fleet, section: SglangSection, model_dir: Path, folder: Path) -> None:
        """
        Args:
            model_dir: a Hugging Face or imported directory of the model.
            folder: where weights that travel by disk lie.
        """
        self._fleet = fleet
        self._section = section
        self._model_dir = model_dir
        self._folder = folder
        self._sync = section.sync
        if section.sync == "distributed" and fleet.lenders and torch.cuda.is_available():
            logger.info("weights reach the servers by shared memory: NCCL joins no two processes of one GPU")
            self._sync = "tensor"
        self._update: WeightUpdate[Any] | None = None
        self._disk: DiskChannel | None = None
        self.weights = INITIAL_WEIGHTS
        self.current = tuple(url for url in fleet.urls if _has(url, INITIAL_WEIGHTS))

    @property
    def absent(self) -> list[str]:
        """Servers that have dropped out, or never had the weights."""
        return [url for url in self._fleet.urls if url not in self.current]

    def await_servers(self) -> None:
        """Wait until one of the owned servers takes requests.

        Raises:
            EngineError: none does, in the time that a start may take.
        """
        deadline = time.monotonic() + self._section.startup_timeout_s
        processes, waiting = self._fleet.processes, list(self._fleet.owned)
        while waiting and not any(is_ready(url) for url in waiting):
            lost = {url: processes.failure(url) if processes else None for url in waiting}
            waiting = [url for url in waiting if lost[url] is None]
            if not waiting or time.monotonic() > deadline:
                reasons = [reason or f"{url} does not answer" for url, reason in lost.items()]
                raise EngineError("no SGLang server is left: " + "; ".join(reasons))
            time.sleep(POLL_S)

    def open(self, weights: str) -> None:
        """Begin to send a version; from here on no server counts as having any."""
        self.weights, self.current = weights, ()
        if not self._fleet.owned:
            return
        timeout_s = self._section.timeout_s
        channel: Channel[Any]
        if self._sync == "disk":
            channel = self._disk = DiskChannel(self._model_dir, self._folder, weights, timeout_s=timeout_s)
        elif self._sync == "tensor":
            channel = SharedMemoryChannel(timeout_s=timeout_s)
        else:
            channel = BroadcastChannel(timeout_s=timeout_s)
        self._update = WeightUpdate(self._fleet.owned, weights, channel, timeout_s=timeout_s)

    def send(self, bucket: NamedTensors) -> None:
        if self._update is not None:
            self._update.send(bucket)

    def close(self) -> bool:
        """End the pass; whether a server has the weights now. Those without are started anew, where this job can."""
        if self._update is None:
            return self._await_owner()
        update, processes = self._update, self._fleet.processes
        update.finish()
        self.current, self._update = tuple(update.current), None
        if self._disk is not None and self.current:
            self._disk.remove_others()
            for url in self._fleet.owned if processes is not None else ():
                processes.start_from(url, self._disk.directory, self.weights)  # type: ignore[union-attr]
        if processes is not None:
            for url, reason in update.failed.items():
                processes.restart(url, f"did not take over new weights: {reason}")
        return bool(self.current)

    def _await_owner(self) -> bool:
        """Another copy sends to the server that this one shares."""
        deadline = time.monotonic() + self._section.timeout_s
        while not self.current and time.monotonic() < deadline:
            self.current = tuple(url for url in self._fleet.urls if _has(url, self.weights))
            if not self.current:
                time.sleep(POLL_S)
        return bool(self.current)


def _has(url: str, weights: str) -> bool:
    try:
        return weights_of(url) == weights
    except (ServerFault, RequestRefused):
        return False
