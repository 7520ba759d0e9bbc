"""The weight sync of a replica: which servers need the policy's weights, and which replica sends them."""

from __future__ import annotations

import logging
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang.channels.base import Channel, NamedTensors
from megatron_vcr1.rollout.sglang.channels.broadcast import BroadcastChannel
from megatron_vcr1.rollout.sglang.channels.device_memory import DeviceMemoryChannel
from megatron_vcr1.rollout.sglang.channels.disk import DiskChannel
from megatron_vcr1.rollout.sglang.channels.flat_bucket import gpu_uuid, shareable_gpu
from megatron_vcr1.rollout.sglang.channels.shared_memory import SharedMemoryChannel
from megatron_vcr1.rollout.sglang.fleet import Fleet
from megatron_vcr1.rollout.sglang.http import (
    INITIAL_WEIGHTS,
    RequestRefused,
    ServerFault,
    is_ready,
    server_info,
    weight_version,
)
from megatron_vcr1.rollout.sglang.memory import WEIGHTS_ONLY, has_weights_only
from megatron_vcr1.rollout.sglang.weight_update import WeightUpdate

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.5


class WeightSync:
    """The sync of weights to the servers of a replica.

    The calls of one pass, in order: `wait_for_server`, `begin`, `send` for every bucket, `end`. The replica leader
    makes them while all ranks of the replica gather the tensors together. The other ranks call only `send`.

    All replicas have the same weights. If they share a server, the first replica that needs it locks it and sends the
    weights, and the others wait for that. This also works if a shared server dies while only some replicas sample: a
    replica that needs it sends the weights, no matter which replica owns the server and what that replica does.

    Attributes:
        version: the weight version that servers must report.
        current: the servers that reported it when they were last asked.
    """

    def __init__(
        self,
        fleet: Fleet,
        section: SglangSection,
        model_dir: Path,
        folder: Path,
        device_channel: DeviceMemoryChannel | None = None,
    ) -> None:
        """
        Args:
            fleet: the replica's servers.
            section: channel and timeouts.
            model_dir: Hugging Face or imported directory of the model.
            folder: parent folder of the weights that travel by disk.
            device_channel: the result of `find_device_channel`, instead of the channel of the settings.
        """
        self._fleet = fleet
        self._section = section
        self._model_dir = model_dir
        self._folder = folder
        self._device_channel = device_channel
        self._channel_name = fleet.placement.weight_channel(fleet.releasing)
        if device_channel is not None:
            logger.info("weights reach the servers by GPU memory that each rank shares with the server on its GPU")
        elif self._channel_name != section.weight_sync:
            logger.info("weights reach the servers by shared memory: NCCL cannot connect two processes of one GPU")
        self._locks = UpdateLocks(fleet.job_id)
        self._update: WeightUpdate[Any] | None = None
        self._disk: DiskChannel | None = None
        self.version = INITIAL_WEIGHTS
        self.current = tuple(url for url in fleet.urls if _has_version(url, INITIAL_WEIGHTS))

    @property
    def outdated(self) -> list[str]:
        """The servers that have dropped out, or that have never had the weights."""
        return [url for url in self._fleet.urls if url not in self.current]

    def wait_for_server(self) -> None:
        """Wait until one of the servers takes requests. A server that still has the last version counts as ready.

        Raises:
            EngineError: no server is ready within `sglang.startup_timeout_s`, or none will be restarted.
        """
        deadline = time.monotonic() + self._section.startup_timeout_s
        processes, waiting = self._fleet.processes, list(self._fleet.urls)
        if any(_has_version(url, self.version) for url in self.current):
            return  # a health check, which computes a token, would take a second
        # A server with memory for its weights alone cannot compute a token.
        while waiting and not any(has_weights_only(url) or is_ready(url) for url in waiting):
            failures = {url: processes.failure(url) if processes else None for url in waiting}
            waiting = [url for url in waiting if failures[url] is None]
            if not waiting or time.monotonic() > deadline:
                reasons = [reason or f"{url} does not respond" for url, reason in failures.items()]
                raise EngineError("no SGLang server is left: " + "; ".join(reasons))
            time.sleep(POLL_INTERVAL_S)

    def begin(self, version: str) -> None:
        """Begin to send a version to the servers that lack it and that no other replica is sending it to.

        The locks are taken before the servers are asked for their versions: in the other order, another replica could
        complete an update in between, and this one would repeat it.
        """
        self.version = version
        locked = [url for url in self._fleet.urls if self._locks.acquire(url)]
        self.current = tuple(url for url in self._fleet.urls if _has_version(url, version))
        for url in {*locked} & {*self.current}:
            self._locks.release(url)
        urls = [url for url in locked if url not in self.current]
        if urls:
            timeout_s = self._section.request_timeout_s
            self._update = WeightUpdate(urls, version, self._open_channel(timeout_s), timeout_s=timeout_s)

    def _open_channel(self, timeout_s: float) -> Channel[Any]:
        if self._device_channel is not None:
            return self._device_channel
        if self._channel_name == "disk":
            self._disk = DiskChannel(self._model_dir, self._folder, self.version, timeout_s=timeout_s)
            return self._disk
        if self._channel_name == "tensor":
            return SharedMemoryChannel(timeout_s=timeout_s)
        return BroadcastChannel(self._fleet.placement.broadcast_backend, timeout_s=timeout_s)

    def send(self, bucket: NamedTensors) -> None:
        """Send a bucket to the servers of this pass. All ranks of the replica must call it, in step.

        Runs the collectives of `DeviceMemoryChannel.prepare` and `release` if there is such a channel, otherwise none.
        """
        if self._update is not None and self._update.current:
            self._update.send(bucket)
        elif self._device_channel is not None:
            with suppress(OSError, RuntimeError):  # raised on all ranks; the leader excludes its servers
                self._device_channel.prepare(bucket)
        if self._device_channel is not None:
            self._device_channel.release()

    def end(self) -> bool:
        """End the pass, and wait for the other replicas that send weights to shared servers if none is current yet.

        Servers that have failed are restarted if this job started them.

        Returns:
            Whether at least one server has the weights.
        """
        if self._update is not None:
            self._finish(self._update)
            self._update = None
        # This cannot wait forever: if a replica dies while it holds a lock, the whole job ends.
        while not self.current and any(self._locks.is_locked(url) for url in self._fleet.urls):
            time.sleep(POLL_INTERVAL_S)
        if not self.current:
            self.current = tuple(url for url in self._fleet.urls if _has_version(url, self.version))
        return bool(self.current)

    def _finish(self, update: WeightUpdate[Any]) -> None:
        update.finish()
        self.current += tuple(update.current)
        processes = self._fleet.processes
        if self._disk is not None and update.current:
            # The new directory is complete and in use: restarts load it from now on, and the older ones can go. In this
            # order, because a server may be restarted at any moment.
            for url in self._fleet.urls if processes is not None else ():
                processes.set_restart_weights(url, self._disk.directory, self.version)  # type: ignore[union-attr]
            self._disk.remove_other_versions()
        if processes is not None:
            for url, reason in update.failed.items():
                processes.restart(url, f"did not take over new weights: {reason}")
        # Last: a replica that gets the lock must find either the new version or a server that is restarting.
        for url in update.urls:
            self._locks.release(url)


class UpdateLocks:
    """One lock per server, so that only one replica sends weights to it at a time.

    The locks are keys in the job's torch.distributed store, which all ranks can reach. `compare_set` is atomic there.
    An empty value means unlocked. The keys contain the id of the job.
    """

    def __init__(self, job_id: str) -> None:
        self._store = dist.PrefixStore(f"sglang {job_id}", _get_default_store())
        self._own_id = uuid.uuid4().hex

    def acquire(self, url: str) -> bool:
        """Try to lock a server; return whether this replica holds the lock now. Does not wait."""
        return self._store.compare_set(url, "", self._own_id).decode() == self._own_id

    def is_locked(self, url: str) -> bool:
        """Return whether any replica holds the lock."""
        return bool(self._store.compare_set(url, "", ""))

    def release(self, url: str) -> None:
        """Unlock a server. Only the holder may call it."""
        self._store.set(url, "")


def find_device_channel(fleet: Fleet, section: SglangSection) -> DeviceMemoryChannel | None:
    """Return this rank's instance of the channel of device memory, or None if the channel of the settings is used.

    Every process of the replica's servers must run on the GPU of one of the replica's ranks. All ranks of the replica
    must call it.
    """
    if not fleet.placement.may_share_gpu_memory:
        return None
    timeout_s = section.request_timeout_s
    gpu = shareable_gpu()
    gpus_of_ranks = collectives.run_on_every_rank(lambda: gpu, mesh.replica_group())
    server_gpus = collectives.broadcast_within_replica(
        lambda: {url: _gpus_of_server(url, timeout_s=timeout_s) for url in fleet.urls}
    )
    needed = {uuid for uuids in server_gpus.values() for uuid in uuids}
    # The same on all ranks.
    if gpu is None or None in gpus_of_ranks:
        logger.info("servers cannot read GPU memory of training: expandable segments, or not torch's own allocator")
        return None
    if not needed <= {*gpus_of_ranks}:
        logger.info("servers cannot read GPU memory of training: a server process is on a GPU of another replica")
        return None
    return DeviceMemoryChannel(gpu, server_gpus, timeout_s=timeout_s)


def _gpus_of_server(url: str, *, timeout_s: float) -> list[str]:
    """Return the UUIDs of the GPUs of a server's tensor-parallel ranks. The server must see the same GPUs as this rank.

    Raises:
        EngineError: the server does not respond.
    """
    try:
        info = server_info(url, timeout_s=timeout_s)
    except (ServerFault, RequestRefused) as error:
        raise EngineError(str(error)) from error
    first, step = int(info["base_gpu_id"]), int(info.get("gpu_id_step", 1))
    return [gpu_uuid(first + step * rank) for rank in range(info["tp_size"])]


def _has_version(url: str, version: str) -> bool:
    try:
        return weight_version(url).removeprefix(WEIGHTS_ONLY) == version
    except (ServerFault, RequestRefused):
        return False
