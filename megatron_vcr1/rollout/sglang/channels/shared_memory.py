"""The tensor channel: weights in shared memory of one host, of which servers get a description.

The memory has a name (a file in /dev/shm). torch keeps a count of users in the memory itself and removes the name when
the count reaches zero; the memory lives until the last process has unmapped it. A process that opens a description
takes over one count. Servers may close the memory before the next one opens it, so the counts must be right:

    pickling the tensors     torch counts one future reader; `prepare` takes that count back
    each call of `send`      adds one count per rank of the server, before the server can open the memory
    a call that fails        a rank may never open the memory, so its count never goes away: remove the name by hand
"""

from __future__ import annotations

import base64
import errno
import io
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.multiprocessing

from megatron_vcr1.rollout.sglang.channels.base import NamedTensors, close_weight_update, open_weight_update
from megatron_vcr1.rollout.sglang.http import call, server_info

SHARED_MEMORY = Path("/dev/shm")
_ALIGNMENT_BYTES = 16


class SharedMemoryChannel:
    """A `Channel` for servers on this host. It holds no state per server, except for an open weight update."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def begin(self, url: str) -> None:
        open_weight_update(url, self._timeout_s)

    def prepare(self, bucket: NamedTensors) -> tuple[str, NamedTensors]:
        """Copy a bucket to shared memory.

        Returns:
            The description, base64 of pickled tensors, and the tensors themselves, which keep the memory alive.

        Raises:
            OSError: /dev/shm has no room for the bucket.
        """
        stream = io.BytesIO()
        with _named_shared_memory():
            shared = _copy_to_shared_memory(bucket)
            ForkingPickler(stream).dump(shared)
        shared[0][1].untyped_storage()._shared_decref()
        return base64.b64encode(stream.getvalue()).decode(), shared

    def send(self, url: str, prepared: tuple[str, NamedTensors]) -> None:
        description, shared = prepared
        num_ranks = int(server_info(url, timeout_s=self._timeout_s)["tp_size"])
        storage = shared[0][1].untyped_storage()  # all tensors of a bucket share it
        for _ in range(num_ranks):
            storage._shared_incref()
        body = {"serialized_named_tensors": [description] * num_ranks, "flush_cache": False}
        try:
            call(url, "POST", "/update_weights_from_tensor", body, timeout_s=self._timeout_s)
        except BaseException:
            # Not at once: the other servers open the memory by its name until the bucket is gone.
            name = storage._share_filename_cpu_()[1].decode()
            weakref.finalize(shared[0][1], (SHARED_MEMORY / name.removeprefix("/")).unlink, missing_ok=True)
            raise

    def finish(self, url: str) -> None:
        close_weight_update(url, self._timeout_s)

    def abort(self, url: str) -> None:
        """Do nothing: the next `begin` closes the weight update."""


@contextmanager
def _named_shared_memory() -> Iterator[None]:
    """Make torch share memory by name. Its default is file descriptors, which only child processes can receive."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _copy_to_shared_memory(bucket: NamedTensors) -> NamedTensors:
    """Copy tensors into one block of shared memory, and return them as views of it."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for _, tensor in bucket]
    # Checked beforehand: a write to a full /dev/shm ends the process with SIGBUS.
    if sum(sizes) > shutil.disk_usage(SHARED_MEMORY).free:
        raise OSError(errno.ENOSPC, "no room for sglang.weight_sync_bucket_mb of weights; lower it", str(SHARED_MEMORY))
    memory = torch.empty(sum(sizes), dtype=torch.uint8).share_memory_()
    shared = []
    for (name, tensor), block in zip(bucket, memory.split(sizes), strict=True):
        view = block[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        shared.append((name, view.copy_(tensor)))
    return shared
