"""The channel of colocated servers: each rank shares a copy of the weights with the server process on its own GPU.

Nothing passes through host memory or between GPUs: a server process copies the weights from one place of its GPU's
memory to another. Every rank of the replica has gathered all weights on its GPU, so a server with several
tensor-parallel ranks reads from as many ranks of the replica. Only the replica leader talks to the servers, so the
other ranks send it the handles of their memory.

The collectives for one bucket, on all ranks of the replica:

    broadcast   which GPUs have a server process that takes the bucket
    gather      errors of the copies. There are no handles before all ranks have copied the bucket
    gather      the handles. Each has exactly one reader
    barrier     the servers have responded, so every rank frees its copy (`release`)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.sglang.channels.base import NamedTensors, close_weight_update, open_weight_update
from megatron_vcr1.rollout.sglang.channels.flat_bucket import LOAD_FORMAT, FlatBucket
from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call

logger = logging.getLogger(__name__)


class DeviceMemoryChannel:
    """A `Channel` of which every rank of the replica has an instance.

    The replica leader passes its instance to a `WeightUpdate`, which calls `prepare` if a server takes the bucket. If
    none does, and on all other ranks, the caller calls `prepare` itself. All ranks then call `release`.
    """

    def __init__(self, gpu: str, server_gpus: Mapping[str, Sequence[str]], *, timeout_s: float) -> None:
        """
        Args:
            gpu: UUID of this rank's GPU.
            server_gpus: on the replica leader, the UUIDs of the GPUs of each server's tensor-parallel ranks, by URL.
            timeout_s: maximum time for a call to a server.
        """
        self._gpu = gpu
        self._server_gpus = server_gpus
        self._timeout_s = timeout_s
        self._receiving: set[str] = set()  # servers between `begin` and `finish` or `abort`
        self._copy: FlatBucket | None = None

    def begin(self, url: str) -> None:
        open_weight_update(url, self._timeout_s)
        self._receiving.add(url)

    def prepare(self, bucket: NamedTensors) -> dict[str, str]:
        """Share a bucket with the server processes on the replica's GPUs. All ranks of the replica must call it.

        Returns:
            The descriptions of the ranks' copies, by the UUIDs of their GPUs.

        Raises:
            OSError, RuntimeError: a rank has no room for the bucket; raised on all ranks.
        """
        wanted = collectives.broadcast_within_replica(self._receiving_gpus)
        if not wanted:
            return {}
        group = mesh.replica_group()

        def copy() -> None:
            if self._gpu in wanted:
                self._copy = FlatBucket(bucket, bucket[0][1].device)

        collectives.run_on_every_rank(copy, group)
        own = self._copy
        described = collectives.run_on_every_rank(lambda: (self._gpu, own.describe()) if own else None, group)
        return dict(pair for pair in described if pair is not None)

    def _receiving_gpus(self) -> set[str]:
        return {gpu for url in self._receiving for gpu in self._server_gpus[url]}

    def send(self, url: str, prepared: dict[str, str]) -> None:
        body = {
            "serialized_named_tensors": [prepared[gpu] for gpu in self._server_gpus[url]],
            "load_format": LOAD_FORMAT,
            "flush_cache": False,
        }
        try:
            call(url, "POST", "/update_weights_from_tensor", body, timeout_s=self._timeout_s)
        except (ServerFault, RequestRefused):
            logger.warning(
                "if SGLang server %s has not read the bucket, each of its GPUs keeps that memory until the run ends "
                "(sglang.weight_sync_bucket_mb)",
                url,
            )
            raise

    def release(self) -> None:
        """Free this rank's copy after all servers have responded. All ranks of the replica must call it."""
        collectives.barrier_within_replica()
        self._copy = None

    def finish(self, url: str) -> None:
        close_weight_update(url, self._timeout_s)
        self._receiving.discard(url)

    def abort(self, url: str) -> None:
        """Share nothing with the server any more. The next `begin` closes its weight update."""
        self._receiving.discard(url)
