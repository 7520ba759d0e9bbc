"""The tensor channel: weights in shared memory of one host, which servers open."""

from __future__ import annotations

import torch

from megatron_vcr1.rollout.sglang.channels.base import NamedTensors, close_weight_update, open_weight_update
from megatron_vcr1.rollout.sglang.channels.flat_bucket import LOAD_FORMAT, FlatBucket
from megatron_vcr1.rollout.sglang.http import call, server_info


class SharedMemoryChannel:
    """A `Channel` for servers on this host. It holds no state per server, except for an open weight update."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def begin(self, url: str) -> None:
        open_weight_update(url, self._timeout_s)

    def prepare(self, bucket: NamedTensors) -> FlatBucket:
        """Copy a bucket to shared memory. Raises OSError: /dev/shm has no room for the bucket."""
        return FlatBucket(bucket, torch.device("cpu"))

    def send(self, url: str, prepared: FlatBucket) -> None:
        num_ranks = int(server_info(url, timeout_s=self._timeout_s)["tp_size"])
        descriptions = [prepared.describe() for _ in range(num_ranks)]
        body = {"serialized_named_tensors": descriptions, "load_format": LOAD_FORMAT, "flush_cache": False}
        try:
            call(url, "POST", "/update_weights_from_tensor", body, timeout_s=self._timeout_s)
        except BaseException:
            prepared.remove_with_last_user()
            raise

    def finish(self, url: str) -> None:
        close_weight_update(url, self._timeout_s)

    def abort(self, url: str) -> None:
        """Do nothing: the next `begin` closes the weight update."""
