"""The policy's weights on their way to the servers that a copy of the model asks."""

from __future__ import annotations

import logging
import time
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang.channels import BroadcastChannel, DiskChannel, SharedMemoryChannel
from megatron_vcr1.rollout.sglang.fleet import Fleet
from megatron_vcr1.rollout.sglang.http import INITIAL_WEIGHTS, RequestRefused, ServerFault, is_ready, weights_of
from megatron_vcr1.rollout.sglang.weight_sync import Channel, NamedTensors, WeightUpdate

logger = logging.getLogger(__name__)

POLL_S = 0.5


class WeightDelivery:
    """On the rank that talks to servers. A pass is `await_servers`, `open`, `send` each bucket, `close`.

    All copies of the model have the same weights. Where they share a server, whoever comes first brings them, and the
    others wait for it: a server that died is served even while those that are done with it train.

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
        self._weight_sync = section.weight_sync
        if section.weight_sync == "broadcast" and fleet.lenders and torch.cuda.is_available():
            logger.info("weights reach the servers by shared memory: NCCL joins no two processes of one GPU")
            self._weight_sync = "tensor"
        self._claims = Claims(fleet.run)
        self._update: WeightUpdate[Any] | None = None
        self._disk: DiskChannel | None = None
        self.weights = INITIAL_WEIGHTS
        self.current = tuple(url for url in fleet.urls if _has(url, INITIAL_WEIGHTS))

    @property
    def absent(self) -> list[str]:
        """Servers that have dropped out, or never had the weights."""
        return [url for url in self._fleet.urls if url not in self.current]

    def await_servers(self) -> None:
        """Wait until one of the servers takes requests, as one does that still has the last version.

        Raises:
            EngineError: none does, in the time that a start may take.
        """
        deadline = time.monotonic() + self._section.startup_timeout_s
        processes, waiting = self._fleet.processes, list(self._fleet.urls)
        if any(_has(url, self.weights) for url in self.current):
            return  # asking it for a token, to be sure, would take a second
        while waiting and not any(is_ready(url) for url in waiting):
            lost = {url: processes.failure(url) if processes else None for url in waiting}
            waiting = [url for url in waiting if lost[url] is None]
            if not waiting or time.monotonic() > deadline:
                reasons = [reason or f"{url} does not answer" for url, reason in lost.items()]
                raise EngineError("no SGLang server is left: " + "; ".join(reasons))
            time.sleep(POLL_S)

    def open(self, weights: str) -> None:
        """Begin to bring a version to the servers that do not have it, and to which no other copy is bringing it."""
        self.weights = weights
        claimed = [url for url in self._fleet.urls if self._claims.take(url)]
        self.current = tuple(url for url in self._fleet.urls if _has(url, weights))
        for url in {*claimed} & {*self.current}:
            self._claims.give_back(url)
        urls = [url for url in claimed if url not in self.current]
        if not urls:
            return
        timeout_s = self._section.request_timeout_s
        channel: Channel[Any]
        if self._weight_sync == "disk":
            channel = self._disk = DiskChannel(self._model_dir, self._folder, weights, timeout_s=timeout_s)
        elif self._weight_sync == "tensor":
            channel = SharedMemoryChannel(timeout_s=timeout_s)
        else:
            channel = BroadcastChannel(timeout_s=timeout_s)
        self._update = WeightUpdate(urls, weights, channel, timeout_s=timeout_s)

    def send(self, bucket: NamedTensors) -> None:
        if self._update is not None:
            self._update.send(bucket)

    def close(self) -> bool:
        """End the pass; whether a server has the weights now. Those without are started anew, where this job can."""
        if self._update is not None:
            self._end(self._update)
            self._update = None
        while not self.current and any(self._claims.is_taken(url) for url in self._fleet.urls):
            time.sleep(POLL_S)  # another copy brings them; if it dies, so does the job
        if not self.current:
            self.current = tuple(url for url in self._fleet.urls if _has(url, self.weights))
        return bool(self.current)

    def _end(self, update: WeightUpdate[Any]) -> None:
        update.finish()
        self.current += tuple(update.current)
        processes = self._fleet.processes
        if self._disk is not None and update.current:
            self._disk.remove_others()
            for url in self._fleet.urls if processes is not None else ():
                processes.start_from(url, self._disk.directory, self.weights)  # type: ignore[union-attr]
        if processes is not None:
            for url, reason in update.failed.items():
                processes.restart(url, f"did not take over new weights: {reason}")
        for url in update.urls:
            self._claims.give_back(url)


class Claims:
    """Which copy of the model brings weights to a server: one at a time. In the job's store, for all of its ranks."""

    def __init__(self, run: str) -> None:
        self._store = dist.PrefixStore(f"sglang {run}", _get_default_store())
        self._mine = uuid.uuid4().hex

    def take(self, url: str) -> bool:
        """Whether it is this one, from now until `give_back`."""
        return self._store.compare_set(url, "", self._mine).decode() == self._mine

    def is_taken(self, url: str) -> bool:
        return bool(self._store.compare_set(url, "", ""))

    def give_back(self, url: str) -> None:
        self._store.set(url, "")


def _has(url: str, weights: str) -> bool:
    try:
        return weights_of(url) == weights
    except (ServerFault, RequestRefused):
        return False
