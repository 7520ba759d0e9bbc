"""One block of memory with all tensors of a bucket, in the format that SGLang calls a flattened bucket.

A server process opens the memory itself, so a request carries only its description. The description is a pickle, since
SGLang's interface takes nothing else. Nothing is ever unpickled on this side.

Every description is for one reader: torch counts the readers that have not closed the memory yet, in the memory itself.

    host memory    a file in /dev/shm. Its name is removed when the last reader has closed it
    GPU memory     a CUDA IPC handle. The memory is reused when the reader has closed it; a reader waits for its copies
                   to complete before it closes. If a server dies before that, or never opens it, the memory of the
                   bucket stays allocated until this process ends
"""

from __future__ import annotations

import base64
import errno
import inspect
import io
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from megatron_vcr1.rollout.sglang.channels.base import NamedTensors

LOAD_FORMAT = "flattened_bucket"
"""Value of `load_format` with which SGLang reads a `FlatBucket`."""
SHARED_MEMORY = Path("/dev/shm")
_ALIGNMENT_BYTES = 16
_strategy_lock = threading.Lock()
_DEVICE_ARGUMENT = list(inspect.signature(rebuild_cuda_tensor).parameters).index("storage_device")


class FlatBucket:
    """A copy of the tensors of a bucket in one block of memory that other processes can open.

    Keep it until all readers have responded.
    """

    def __init__(self, bucket: NamedTensors, device: torch.device) -> None:
        """Allocate the memory and copy the tensors to it.

        Args:
            bucket: names and tensors.
            device: "cpu" for shared host memory, or the GPU of this process.

        Raises:
            OSError: /dev/shm has no room for the bucket.
            RuntimeError: the GPU has no room for the bucket.
        """
        sizes = [-(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for _, tensor in bucket]
        *starts, total = accumulate(sizes, initial=0)
        self._memory = _allocate(total, device)
        # SGLang reads these attributes of any object. Its unpickler refuses classes that it does not know.
        self._metadata = []
        for (name, tensor), start in zip(bucket, starts, strict=True):
            end = start + tensor.nbytes
            self._memory[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            self._metadata.append(
                SimpleNamespace(
                    name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start
                )
            )

    def describe(self) -> str:
        """Return a description of the memory for one reader: base64 of a pickle."""
        memory = _DeviceHandle(self._memory) if self._memory.is_cuda else self._memory
        stream = io.BytesIO()
        with _named_shared_memory():
            ForkingPickler(stream).dump({"flattened_tensor": memory, "metadata": self._metadata})
        return base64.b64encode(stream.getvalue()).decode()

    def remove_with_last_user(self) -> None:
        """Remove the name of shared host memory when this process has freed it. Call it if a reader has failed.

        The reader may never have opened the memory, and then torch would keep the name for ever. It is not removed at
        once, because other readers may be about to open it.
        """
        if not self._memory.is_cuda:
            name = self._memory.untyped_storage()._share_filename_cpu_()[1].decode()
            weakref.finalize(self._memory, (SHARED_MEMORY / name.removeprefix("/")).unlink, missing_ok=True)


def shareable_gpu() -> str | None:
    """Return the UUID of this process's GPU if its memory has CUDA IPC handles that need no special permission.

    None without CUDA, if the allocator is not torch's own (others have no handles), and if it may use expandable
    segments: another process then needs the permission to trace this one.
    """
    settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if not torch.cuda.is_available() or torch.cuda.get_allocator_backend() != "native":
        return None
    if any("expandable_segments:true" in value.lower().replace(" ", "") for value in settings):  # as torch reads it
        return None
    return gpu_uuid(torch.cuda.current_device())


def gpu_uuid(index: int) -> str:
    """Return the UUID of a GPU, as SGLang's servers compute it."""
    return str(torch.cuda.get_device_properties(index).uuid)


class _DeviceHandle:
    """Pickles GPU memory with the UUID of its GPU, for which SGLang looks among its GPUs.

    torch's own pickle has the index of the GPU, which differs between processes that see different GPUs.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reduce_tensor(self._memory)
        arguments = list(arguments)
        arguments[_DEVICE_ARGUMENT] = gpu_uuid(arguments[_DEVICE_ARGUMENT])
        return rebuild, tuple(arguments)


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    too_large = f"no room for {num_bytes / 2**20:.0f} MiB of weights; lower sglang.weight_sync_bucket_mb"
    if device.type == "cpu":
        # Checked beforehand: a write to a full /dev/shm ends the process with SIGBUS.
        if num_bytes > shutil.disk_usage(SHARED_MEMORY).free:
            raise OSError(errno.ENOSPC, too_large, str(SHARED_MEMORY))
        with _named_shared_memory():
            return torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{device}: {too_large}") from error


@contextmanager
def _named_shared_memory() -> Iterator[None]:
    """Make torch share memory by name. Its default is file descriptors, which only child processes can receive.

    The strategy belongs to the process: the lock keeps one thread from restoring it while another one pickles.
    """
    with _strategy_lock:
        before = torch.multiprocessing.get_sharing_strategy()
        torch.multiprocessing.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch.multiprocessing.set_sharing_strategy(before)
